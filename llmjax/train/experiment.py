"""What training needs of an experiment; the whole of it stands above this room."""

from typing import Any, Protocol

from llmjax.nn.model import Model
from llmjax.objectives.base import Objective
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import Optimizer


class Experiment(Protocol):
    """The parts of a run."""

    @property
    def model(self) -> Model:
        """The network."""

    @property
    def data(self) -> Any:
        """Its `build(seed)` gives the pipeline."""

    @property
    def objective(self) -> Objective:
        """The loss."""

    @property
    def optimizer(self) -> Optimizer:
        """The update rule and its schedule."""

    @property
    def train(self) -> Train:
        """The loop."""

    @property
    def mesh(self) -> MeshConfig:
        """The devices."""

    @property
    def seed(self) -> int:
        """The root of all draws."""
