"""A training process for test_resume to kill: `python -m tests.train.killed RUN_DIR SECONDS_A_LINE`."""

import functools
import sys
import time
from typing import Any

from llmjax.experiment import Experiment
from llmjax.train.ema import Ema
from llmjax.train.loop import fit
from tests.train.tiny import tiny


def experiment(**train: Any) -> Experiment:
    """Dropout, accumulation and an average, so that keys, order and every part of the state matter."""
    changes = {"model.dropout": 0.1}
    settings = {"accumulate": 2, "log_every": 3, "eval_every": 8, "checkpoint_every": 4, "keep_last": 2}
    return tiny(changes, ema=Ema(decay=0.9), **(settings | train))


def long() -> Experiment:
    """A minute of it at a tenth of a second a line."""
    return experiment(steps=1600, eval_every=160, checkpoint_every=16)


def told(event: dict[str, Any], pause: float) -> None:
    """Tell what happens, and give the killer time."""
    print({name: event[name] for name in ("event", "step", "stopped") if name in event}, flush=True)
    if event["event"] == "log":
        time.sleep(pause)


if __name__ == "__main__":
    fit(long(), sys.argv[1], report=functools.partial(told, pause=float(sys.argv[2])))
