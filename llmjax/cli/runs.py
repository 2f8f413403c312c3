"""A run directory opened: its experiment, its data and the parameters to measure and sample with."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmjax.config import InputError
from llmjax.data import Batches
from llmjax.experiment import Experiment, load, load_experiment
from llmjax.nn.model import Params
from llmjax.parallel.mesh import MeshConfig
from llmjax.train import checkpoint
from llmjax.train.checkpoint import Checkpoint
from llmjax.train.load import params_of
from llmjax.train.loop import use_compilation_cache


class Run(NamedTuple):
    """What a verb needs of a run."""

    experiment: Experiment
    pipeline: Batches
    params: Params
    """averaged ones where the run keeps an average, on one device"""
    step: int


def open_run(run_dir: str | Path, which: str, overrides: Sequence[str] = ()) -> Run:
    """The run with the parameters of the checkpoint `which`: best, last or a step.

    Raises InputError where there is no such run or checkpoint, or where an override changes what was trained.
    """
    load(run_dir)
    experiment = load_experiment(str(run_dir), overrides)
    use_compilation_cache()
    found = choose(run_dir, which)
    params = params_of(experiment, found, MeshConfig())
    return Run(experiment, experiment.data.build(experiment.seed), params, found.step)


def choose(run_dir: str | Path, which: str) -> Checkpoint:
    """The intact checkpoint `which` of a run; raises InputError where there is none."""
    if which in ("best", "last"):
        found = (checkpoint.best if which == "best" else checkpoint.newest)(run_dir, warn)
        if found is None:
            raise InputError(f"{run_dir} holds no intact checkpoint: train it first")
        return found
    kept = checkpoint.steps(run_dir)
    if not which.isdecimal() or int(which) not in kept:
        listed = ", ".join(map(str, kept)) or "none"
        raise InputError(f"--checkpoint={which}: expected best, last or a step that is kept in {run_dir} ({listed})")
    try:
        return checkpoint.verified(checkpoint.place(run_dir, int(which)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"checkpoint {which} of {run_dir} is damaged ({error}): use another one") from None


def warn(message: str) -> None:
    """A warning, in one line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
