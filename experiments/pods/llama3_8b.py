"""Llama-3-8B shapes at length 8192 on a pod: 64 chips of v5p, or 256 of v6e.

What:   32 layers of width 4096 (8.03B parameters) on your own token shards, bfloat16 compute on float32 parameters,
        AdamW. fsdp=32 and not more: shards of 128 rows of d_model are the smallest that XLA:TPU gathers as they are (of
        64 it makes an all-reduce of zero-padded copies). The loss takes all tokens of a chip at once on v5p: in chunks
        of 1024 tokens the head would be gathered and its gradient summed 512 times a step, 3.5 TB a chip.
Cost:   estimated, no pod has run it (libtpu 0.0.42; efficiencies in llmjax/plan/chips.py). MFU counts half the pairs of
        causal attention; MaxText's tables count all of them.
        llama3_8b.py --target=v5p:4x4x4
            71.0 GiB of 95.7 a chip, 2.732 s a step of 1,048,576 tokens, MFU 67.3 % (all pairs 75.7 %): matrix products
            1.89 s, attention 0.57 s, bound by HBM 0.14 s, collectives 0.12 s. The compiler's own clock of its fusions
            is 2.54 s where this has 2.03 s: 57 % with it.
        llama3_8b.py:v6e --target=v6e:16x16
            20.7 GiB of 31.2 a chip, 3.733 s a step of 6,291,456 tokens, MFU 36.9 % (all pairs 41.5 %): matrix products
            2.11 s, attention 1.03 s, bound by HBM 0.29 s, collectives 0.30 s. The best published is 45.5 % (all pairs),
            with activations offloaded to the hosts. Attention of head_dim 128 leaves half of v6e's matrix unit idle.
Expect: not known: no pod has trained it yet.
Run:    llmjax train experiments/pods/llama3_8b.py --data.source.path=tokens/ --run-dir=runs/llama3_8b
"""

from dataclasses import replace

from llmjax.data import Data, TokenShards
from llmjax.experiment import Experiment
from llmjax.models.llama import llama3
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """64 chips of v5p: 128 rows, 1,048,576 tokens an update."""
    return Experiment(
        name="llama3_8b",
        model=replace(llama3("8B"), remat="dots", unroll=1),
        data=Data(source=TokenShards(path="tokens"), length=8192, batch_size=128),
        objective=NextToken(chunk=None, z_loss=1e-4),
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


def v6e() -> Experiment:
    """256 chips of v6e: 768 rows, 6,291,456 tokens an update."""
    base = experiment()
    return replace(
        base,
        model=replace(base.model, remat="full"),
        data=replace(base.data, batch_size=768),
        objective=NextToken(chunk=2**20, z_loss=1e-4),
        mesh=MeshConfig(data=8, fsdp=32),
    )
