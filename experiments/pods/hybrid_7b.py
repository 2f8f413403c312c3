"""A hybrid of about 7B parameters at length 8192: one layer of attention to seven of Mamba-2, on 64 chips of v5p.

What:   32 layers of width 4096, every eighth with grouped attention and the others with Mamba-2 (Dao and Gu 2024,
        2405.21060), as Jamba has it of attention and Mamba (Lieber et al. 2024, 2403.19887), all with a SwiGLU; no
        positions but those that the recurrences know. Token shards of your own, bfloat16 compute on float32 parameters,
        AdamW. The shape is nobody's published model.
Cost:   estimated, no pod has run it (libtpu 0.0.42; efficiencies in llmjax/plan/chips.py). MFU counts half the pairs of
        causal attention.
        hybrid_7b.py --target=v5p:4x4x4
            39.9 GiB of 95.7 a chip, 3.123 s a step of 1,048,576 tokens, MFU 49.3 % (all pairs 50.2 %): matrix products
            2.21 s, attention and scans 0.10 s, bound by HBM 0.69 s, collectives 0.12 s (with the scan in plain XLA 3.60
            s, 42.8 %). The compiler's own clock of its fusions is 3.93 s (it was 6.27 s) where this has 2.90 s.
            Compiled in 260 s on two busy cores.
Expect: not known: no pod has trained it yet.
Run:    llmjax train experiments/pods/hybrid_7b.py --data.source.path=tokens/ --run-dir=runs/hybrid_7b
"""

from llmjax.data import Data, TokenizerJson, TokenShards
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.mlp import GLU
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """64 chips of v5p: 128 rows, 1,048,576 tokens an update."""
    mlp = GLU(d_ff=8192, activation="silu")
    recurrent = Block(mixer=Mamba2(groups=8), mlp=mlp)
    attending = Block(mixer=Attention(heads=32, kv_heads=8, rope=None), mlp=mlp)
    return Experiment(
        name="hybrid_7b",
        model=Decoder(
            vocab=128256,
            d_model=4096,
            layers=32,
            pattern=(*[recurrent] * 4, attending, *[recurrent] * 3),
            initializer=LlamaInit(),
            remat="full",
            unroll=1,
        ),
        data=Data(
            source=TokenShards(path="tokens"),
            tokenizer=TokenizerJson(path="tokens/tokenizer.json"),
            length=8192,
            batch_size=128,
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
        mesh=MeshConfig(data=2, fsdp=32),
    )
