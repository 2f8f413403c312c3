"""Lion (Chen 2023, arXiv:2302.06675): the sign of a momentum, one buffer."""

from collections.abc import Iterator
from dataclasses import dataclass

import optax

from llmjax.train.optimizers.base import Optimizer, rate_problems


@dataclass(frozen=True)
class Lion(Optimizer):
    """sign(b1 * m + (1 - b1) g), then m <- b2 * m + (1 - b2) g.

    The paper's advice: a learning rate 3 to 10 times smaller than AdamW's and a weight decay as much larger.
    """

    weight_decay: float = 1.0
    """Pull of the parameters towards zero, times the learning rate."""
    b1: float = 0.9
    """Weight of the momentum in the direction."""
    b2: float = 0.99
    """Decay rate of the momentum."""

    def direction(self) -> optax.GradientTransformation:
        """Sign of the interpolated momentum."""
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "b1", "b2")
