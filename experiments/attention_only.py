"""Two layers of attention and nothing else find what followed a letter before; one layer cannot: induction heads.

What:   attention without MLP or norm (Elhage et al. 2021) on "A b ... A": b followed every trigger A before and is
        asked for (Olsson et al. 2022, 2209.11895). A key must know the token before its own, which takes a layer.
Cost:   800 steps in 30 to 90 seconds on two of four busy CPU cores, 0.03M parameters.
Expect: held-out accuracy 99.9 % (chance 14 %; 61 % after 300 steps, 92 % after 400). One layer: 27 %, never above 32 %;
        better than chance is possible, as letters right before a trigger are seldom its answer. Seed 1: 99.3 %, 29 %.
        Tiny: 97 % in 8 seconds, its one layer (--model.layers=1) 47 % where chance is 25 %.
Run:    llmjax train experiments/attention_only.py --run-dir=runs/attention-only
        llmjax train experiments/attention_only.py:one_layer
"""

from dataclasses import replace

from llmjax.config import with_
from llmjax.data import Synthetic
from llmjax.data.tasks.induction import Induction
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.models.attention_only import attention_only
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """Two layers; every prompt begins with symbol 0, which is the trigger: the sample is what followed it, 5."""
    return Experiment(
        name="attention-only",
        model=attention_only(layers=2, d_model=64, heads=4, vocab=8),
        data=Synthetic(task=Induction(letters=7), length=64, batch_size=32),
        optimizer=AdamW(schedule=Cosine(learning_rate=5e-3, warmup=0.25), weight_decay=0.0),
        train=Train(steps=800, log_every=50, eval_every=100, checkpoint_every=400),
        generate=Generate(prompt="5 7 2 6 4 1 3 0", max_tokens=1, temperature=0.0),
    )


def one_layer() -> Experiment:
    """One layer, where no key tells what came before it."""
    return with_(with_(experiment(), "name", "attention-only-1"), "model.layers", 1)


def tiny() -> Experiment:
    """Two layers of two heads, four letters, rows of 24."""
    return replace(
        experiment(),
        name="attention-only-tiny",
        model=attention_only(layers=2, d_model=32, heads=2, vocab=5),
        data=Synthetic(task=Induction(letters=4), length=24, batch_size=32),
        optimizer=AdamW(schedule=Cosine(learning_rate=1e-2, warmup=0.25), weight_decay=0.0),
        train=Train(steps=400, log_every=50, eval_every=50, checkpoint_every=400),
        generate=Generate(prompt="2 4 1 3 0", max_tokens=1, temperature=0.0),
    )
