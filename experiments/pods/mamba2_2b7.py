"""Mamba-2-2.7B shapes (Dao and Gu 2024, 2405.21060) at length 8192: 16 chips of v5p or v6e, or a node of 8 H200.

What:   64 layers of Mamba-2 of width 2560 and nothing else (2.70B parameters; 80 heads of 64 features, 128 states), the
        head tied to the embedding, on your own token shards, bfloat16 compute on float32 parameters, AdamW.
Cost:   estimated, no pod has run it (libtpu 0.0.42; efficiencies in llmjax/plan/chips.py). On TPU the scan is a
        kernel; on the H200 plain XLA, which moves all that it makes through HBM.
        mamba2_2b7.py --target=v5p:2x2x4
            47.1 GiB of 95.7 a chip, 9.665 s a step of 1,048,576 tokens, MFU 24.9 %: matrix products 4.37 s, scans 0.18
            s, bound by HBM 5.08 s, collectives 0.03 s (with the scan in plain XLA 12.46 s, 19.3 %). The compiler's own
            clock of its fusions is 15.6 s (it was 28.7 s) where this has 9.46 s. Compiled in 123 s on two busy cores.
        mamba2_2b7.py:v6e --target=v6e:4x4
            13.2 GiB of 31.2 a chip, 2.651 s a step of 262,144 tokens, MFU 11.3 %: matrix products 0.54 s, scans 0.05 s,
            bound by HBM 2.01 s, collectives 0.05 s of 0.17 s.
        mamba2_2b7.py:h200 --target=h200:1x1x8
            37.4 GiB of 118.2 a GPU, 6.242 s a step of 524,288 tokens, MFU 17.9 %: matrix products 2.0 s, bound by HBM
            4.2 s, collectives hidden. XLA:GPU tells no clock of its own. Compiled in 29 s.
Expect: not known: no pod has trained it yet.
Run:    llmjax train experiments/pods/mamba2_2b7.py --data.source.path=tokens/ --run-dir=runs/mamba2_2b7
"""

from dataclasses import replace

from llmjax.data import Data, TokenizerJson, TokenShards
from llmjax.experiment import Experiment
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.norms import RMSNorm
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """16 chips of v5p: 128 rows, 1,048,576 tokens an update."""
    return Experiment(
        name="mamba2_2b7",
        model=Decoder(
            vocab=50288,
            d_model=2560,
            layers=64,
            pattern=(Block(mixer=Mamba2(), mlp=None, norm=RMSNorm(eps=1e-5)),),
            norm=RMSNorm(eps=1e-5),
            tied=True,
            remat="full",
            unroll=1,
        ),
        data=Data(
            source=TokenShards(path="tokens"),
            tokenizer=TokenizerJson(path="tokens/tokenizer.json"),
            length=8192,
            batch_size=128,
        ),
        objective=NextToken(chunk=2048),
        optimizer=AdamW(schedule=Cosine(learning_rate=1.6e-4, warmup=2000), weight_decay=0.1, b2=0.95),
        train=Train(
            steps=100_000,
            precision=Precision(compute="bfloat16"),
            eval_every=1000,
            eval_batches=16,
            checkpoint_every=1000,
        ),
        mesh=MeshConfig(fsdp=16),
    )


def v6e() -> Experiment:
    """16 chips of v6e: 32 rows, 262,144 tokens an update."""
    base = experiment()
    return replace(base, data=replace(base.data, batch_size=32))


def h200() -> Experiment:
    """A node of 8 H200: 64 rows, 524,288 tokens an update."""
    base = experiment()
    return replace(base, data=replace(base.data, batch_size=64), mesh=MeshConfig(fsdp=8))
