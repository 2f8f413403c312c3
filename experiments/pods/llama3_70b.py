"""Llama-3-70B shapes at length 8192 on a pod: 512 chips of v5p.

What:   80 layers of width 8192 (70.6B parameters) on your own token shards, bfloat16 compute on float32 parameters,
        AdamW, all recomputed but the blocks' inputs and attention's results. fsdp=64 leaves shards of 128 rows of
        d_model, the smallest that XLA:TPU gathers as they are.
Cost:   estimated, no pod has run it (libtpu 0.0.42; efficiencies in llmjax/plan/chips.py). MFU counts half the pairs of
        causal attention; MaxText's tables count all of them.
        llama3_70b.py --target=v5p:8x8x8
            75.4 GiB of 95.7 a chip, 25.63 s a step of 8,388,608 tokens, MFU 62.6 % (all pairs 67.1 %; MaxText
            publishes 65.4 % for Llama-2-70B at length 4096 on 256 chips): matrix products 21.7 s, attention 2.2 s,
            bound by HBM 0.4 s, collectives 1.3 s. The compiler's own clock of its fusions is 24.2 s where this has
            22.1 s: 58 % with it. With remat="full" it was 58.8 GiB and 26.25 s. Compiled in 233 s on a shared core.
Expect: not known: no pod has trained it yet.
Run:    llmjax train experiments/pods/llama3_70b.py --data.source.path=tokens/ --run-dir=runs/llama3_70b
"""

from dataclasses import replace

from llmjax.data import Data, TokenizerJson, TokenShards
from llmjax.experiment import Experiment
from llmjax.models.llama import llama3
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """512 chips of v5p: 1,024 rows, 8,388,608 tokens an update."""
    return Experiment(
        name="llama3_70b",
        model=replace(llama3("70B"), remat="attention", unroll=1),
        data=Data(
            source=TokenShards(path="tokens"),
            tokenizer=TokenizerJson(path="tokens/tokenizer.json"),
            length=8192,
            batch_size=1024,
        ),
        objective=NextToken(chunk=2048, z_loss=1e-4),
        optimizer=AdamW(schedule=Cosine(learning_rate=1.5e-4, warmup=2000), weight_decay=0.1, b2=0.95),
        train=Train(
            steps=100_000,
            precision=Precision(compute="bfloat16"),
            eval_every=1000,
            eval_batches=16,
            checkpoint_every=1000,
        ),
        mesh=MeshConfig(data=8, fsdp=64),
    )
