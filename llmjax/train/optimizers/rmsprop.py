"""RMSprop (Tieleman and Hinton 2012, lecture 6.5), in PyTorch's form."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import optax

from llmjax.train.optimizers.base import Optimizer, eps_problems, rate_problems


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """v_t = decay * v_{t-1} + (1 - decay) g_t^2; the direction is g_t / (sqrt(v_t) + eps), with momentum on top."""

    weight_decay: float = 0.0
    """Coefficient of the L2 term's gradient, lambda in lambda/2 |params|^2."""
    decay: float = 0.99
    """Decay rate of the mean square gradient."""
    eps: float = 1e-8
    """Added to sqrt(v)."""
    momentum: float = 0.0
    """Decay rate of the summed directions; 0 for none."""

    decay_is_l2: ClassVar[bool] = True

    def direction(self) -> optax.GradientTransformation:
        """Gradient over its root mean square, then the momentum buffer."""
        rms = optax.scale_by_rms(decay=self.decay, eps=self.eps, eps_in_sqrt=False)
        return optax.chain(rms, optax.trace(decay=self.momentum)) if self.momentum else rms

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "decay", "momentum")
        yield from eps_problems(self.eps)
