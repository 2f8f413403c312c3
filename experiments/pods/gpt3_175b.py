"""GPT-3 175B as it was trained, on 512 chips of v5p: banded layers, a ramp of the batch, a cosine over 260B tokens.

What:   96 layers of width 12288 (174,604,259,328 parameters) on your own token shards; AdamW with betas 0.9 and 0.95,
        weight decay 0.1, gradients clipped to norm 1; 300 billion tokens in batches of 3.1 million. The learning rate
        rises to 6e-5 over 375 million tokens and falls to a tenth of it at 260 billion (Brown et al. 2020, 2005.14165).
        Batches grow over the first 4 billion tokens (the paper: 4 to 12), by microbatches of 256 rows: 524k tokens are
        the smallest here, where the paper began with 32k. The cosine is one of updates, not of tokens.
Cost:   estimated, no pod has run it (libtpu 0.0.42; efficiencies in llmjax/plan/chips.py). MFU counts half the pairs of
        causal attention.
        gpt3_175b.py --target=v5p:8x8x8
            52.6 GiB of 95.7 a chip, 24.39 s a step of 3,145,728 tokens, MFU 58.0 % (all pairs 58.5 %): matrix products
            16.67 s, attention 0.22 s, bound by HBM 1.18 s, collectives that nothing hides 6.32 s; 343,769 chip hours in
            all. In 12 microbatches with remat="full" 14.0 GiB, 35.96 s, 39.3 %. Compiled in 944 s beside
            twelve other processes.
Expect: not known: no pod has trained it.
Run:    llmjax train experiments/pods/gpt3_175b.py --data.source.path=tokens/ --run-dir=runs/gpt3_175b
"""

from dataclasses import replace

from llmjax.data import Data, TokenizerJson, TokenShards
from llmjax.experiment import Experiment
from llmjax.models.gpt3 import gpt3
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.ramp import BatchRamp
from llmjax.train.schedules import Cosine

LENGTH, ROWS, MICROBATCHES = 2048, 1536, 6
RAMP = BatchRamp(start=16, over=4_000_000_000 // LENGTH)


def experiment() -> Experiment:
    """300 billion tokens."""
    schedule = Cosine(learning_rate=6e-5, warmup=_updates(375_000_000), end=_updates(260_000_000_000))
    return Experiment(
        name="gpt3_175b",
        model=replace(gpt3("175B"), remat="dots", unroll=1),
        data=Data(
            source=TokenShards(path="tokens"),
            tokenizer=TokenizerJson(path="tokens/tokenizer.json"),
            length=LENGTH,
            batch_size=ROWS,
        ),
        objective=NextToken(chunk=2048),
        optimizer=AdamW(schedule=schedule, weight_decay=0.1),
        train=Train(
            steps=_updates(300_000_000_000),
            accumulate=MICROBATCHES,
            ramp=RAMP,
            precision=Precision(compute="bfloat16"),
            eval_every=1000,
            eval_batches=16,
            checkpoint_every=1000,
        ),
        mesh=MeshConfig(fsdp=128, tensor=4),
    )


def _updates(tokens: int) -> int:
    """Updates that it takes to read so many tokens."""
    return RAMP.steps(ROWS, MICROBATCHES, tokens // LENGTH)
