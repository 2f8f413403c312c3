"""Stochastic gradient descent with momentum (Polyak 1964; Nesterov 1983 in the form of Sutskever 2013)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import optax

from llmjax.train.optimizers.base import Optimizer, rate_problems


@dataclass(frozen=True)
class SGD(Optimizer):
    """m_t = momentum * m_{t-1} + g_t; the direction is m_t, or g_t + momentum * m_t with Nesterov."""

    weight_decay: float = 0.0
    """Coefficient of the L2 term's gradient, lambda in lambda/2 |params|^2."""
    momentum: float = 0.9
    """Decay rate of the summed gradients; 0 for plain SGD, which keeps no state."""
    nesterov: bool = False
    """Look one step ahead."""

    decay_is_l2: ClassVar[bool] = True

    def direction(self) -> optax.GradientTransformation:
        """The momentum buffer, as in PyTorch: the learning rate is outside of it."""
        if self.momentum == 0:
            return optax.identity()
        return optax.trace(decay=self.momentum, nesterov=self.nesterov)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "momentum")
        if self.nesterov and self.momentum == 0:
            yield "nesterov", "needs momentum: use momentum=0.9, or nesterov=False"
