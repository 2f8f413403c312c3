"""Parameters out of a run directory, as evaluation and sampling want them."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from llmjax.config import InputError
from llmjax.nn.model import Params, merged
from llmjax.parallel.mesh import MeshConfig
from llmjax.train import checkpoint
from llmjax.train.checkpoint import Checkpoint
from llmjax.train.evaluate import averaged
from llmjax.train.experiment import Experiment
from llmjax.train.state import plan


def load_params(
    experiment: Experiment,
    run_dir: str | Path,
    warn: Callable[[str], None],
    which: Literal["newest", "best"] = "newest",
) -> tuple[Params, int]:
    """Float32 parameters to evaluate and sample with (averaged, where the run averages), and their step.

    They are placed on the experiment's mesh, whatever mesh they were trained on. `best` is the checkpoint of lowest
    held-out loss. `warn` gets a line for each damaged checkpoint that is passed over. Raises InputError where there is
    no intact checkpoint, or the newest is of another shape.
    """
    found = (checkpoint.newest if which == "newest" else checkpoint.best)(run_dir, warn)
    if found is None:
        raise InputError(f"{run_dir} holds no intact checkpoint: train it first")
    return params_of(experiment, found, experiment.mesh), found.step


def params_of(experiment: Experiment, found: Checkpoint, mesh: MeshConfig) -> Params:
    """Float32 parameters of a checkpoint to evaluate and sample with (averaged, where the run averages), on `mesh`."""
    with mesh.in_force():
        target = plan(experiment.model, experiment.optimizer, experiment.train, mesh.build()).abstract
    average = averaged(experiment.optimizer, experiment.train.ema)
    if average is None:
        return merged(found.params(target.params), found.frozen(target.frozen))
    return jax.jit(average)(found.state(target))
