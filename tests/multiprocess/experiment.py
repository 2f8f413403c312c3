"""What the hosts of tests/multiprocess train: `experiment()` fast, `long()` until somebody stops it."""

import dataclasses

from llmjax.experiment import Experiment
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Constant
from tests.train.killed import experiment as killed


def experiment() -> Experiment:
    """Twelve steps with dropout, accumulation and an average, over all devices."""
    return dataclasses.replace(killed(eval_every=4, log_every=1), mesh=MeshConfig(data=0))


def fsdp() -> Experiment:
    """The same with parameters and optimizer state in two parts."""
    return dataclasses.replace(experiment(), mesh=MeshConfig(data=0, fsdp=2))


def long() -> Experiment:
    """Longer than any test, at a rate that does not depend on how long."""
    settings = {"steps": 10**6, "eval_every": 0, "log_every": 5, "checkpoint_every": 20}
    optimizer = AdamW(schedule=Constant(learning_rate=3e-3))
    return dataclasses.replace(killed(**settings), optimizer=optimizer, mesh=MeshConfig(data=0))
