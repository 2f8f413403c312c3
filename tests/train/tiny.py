"""The smallest experiments that train: one layer of width 32 on bytes of made-up text."""

import dataclasses
import random
from typing import Any

import jax
import numpy as np

from llmjax.config import with_
from llmjax.data import Bytes, ConcatAndSplit, Data, InMemory
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import GLU
from llmjax.objectives.next_token import NextToken
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine

WORDS = ("alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "é")


def texts(count: int = 60) -> tuple[str, ...]:
    """Documents of random words, always the same."""
    draw = random.Random(0)
    return tuple(" ".join(draw.choice(WORDS) for _ in range(40)) for _ in range(count))


def tiny(changes: dict[str, Any] | None = None, **train: Any) -> Experiment:
    """An experiment whose step takes a few milliseconds; `train` fields by name, any others by path."""
    defaults = {"steps": 12, "log_every": 3, "eval_every": 6, "eval_batches": 2, "checkpoint_every": 4}
    experiment = Experiment(
        name="tiny",
        model=Decoder(vocab=257, d_model=32, layers=1, pattern=(Block(mixer=Attention(heads=2), mlp=GLU()),)),
        data=Data(source=InMemory(texts=texts()), tokenizer=Bytes(), packing=ConcatAndSplit(), length=16, batch_size=8),
        objective=NextToken(chunk=None),
        optimizer=AdamW(schedule=Cosine(learning_rate=3e-3, warmup=2)),
        train=dataclasses.replace(Train(), **(defaults | train)),
    )
    for path, value in (changes or {}).items():
        experiment = with_(experiment, path, value)
    return experiment


def differing(one: Any, other: Any) -> int:
    """Number of bytes in which two trees of arrays of the same structure differ."""
    counts = jax.tree.map(lambda a, b: np.sum(bytes_of(a) != bytes_of(b)), one, other)
    return int(sum(jax.tree.leaves(counts)))


def bytes_of(array: Any) -> np.ndarray:
    """An array's memory."""
    return np.frombuffer(np.asarray(array).tobytes(), np.uint8)
