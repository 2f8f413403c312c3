"""Mixtral-8x7B shapes (Jiang et al. 2024, 2401.04088) at length 8192 on a pod: 128 chips of v5p.

What:   32 layers of width 4096, of 8 experts in each a token meets 2 (46.7B parameters, 12.9B of them at work on a
        token), on your own token shards, bfloat16 compute on float32 parameters, AdamW. The batch is split over the
        experts' axis too: tokens go to their experts and back, all to all, with room for 1.25 times the mean load
        where Mixtral drops nothing.
Cost:   estimated, no pod has run it (libtpu 0.0.42; efficiencies in llmjax/plan/chips.py). MFU counts half the pairs of
        causal attention.
        mixtral_8x7b.py --target=v5p:4x4x8
            24.0 GiB of 95.7 a chip, 9.100 s a step of 2,097,152 tokens, MFU 32.5 % (all pairs 35.1 %): matrix products
            6.80 s, attention 0.58 s, bound by HBM 1.40 s, collectives 0.33 s of 0.50 s. The products are 2.3 times the
            model's: blocks are recomputed, and buffers have room that stays empty. Compiled in 409 s on two busy cores.
Expect: not known: no pod has trained it yet.
Run:    llmjax train experiments/pods/mixtral_8x7b.py --data.source.path=tokens/ --run-dir=runs/mixtral_8x7b
"""

from llmjax.data import Data, TokenizerJson, TokenShards
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope
from llmjax.nn.router import TopK
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """128 chips of v5p: 256 rows, 2,097,152 tokens an update."""
    block = Block(
        mixer=Attention(heads=32, kv_heads=8, rope=Rope(base=1e6)),
        mlp=MoE(experts=8, expert=GLU(d_ff=14336, activation="silu"), router=TopK(k=2), capacity=1.25),
        norm=RMSNorm(eps=1e-5),
    )
    return Experiment(
        name="mixtral_8x7b",
        model=Decoder(
            vocab=32000,
            d_model=4096,
            layers=32,
            pattern=(block,),
            norm=RMSNorm(eps=1e-5),
            initializer=LlamaInit(),
            remat="full",
            unroll=1,
        ),
        data=Data(
            source=TokenShards(path="tokens"),
            tokenizer=TokenizerJson(path="tokens/tokenizer.json"),
            length=8192,
            batch_size=256,
        ),
        objective=NextToken(chunk=2048, z_loss=1e-4),
        optimizer=AdamW(schedule=Cosine(learning_rate=3e-4, warmup=2000), weight_decay=0.1, b2=0.95),
        train=Train(
            steps=100_000,
            precision=Precision(compute="bfloat16"),
            eval_every=1000,
            eval_batches=16,
            checkpoint_every=1000,
        ),
        mesh=MeshConfig(fsdp=16, expert=8, rules=(("batch", "data", "fsdp", "expert"),)),
    )
