"""Adam (Kingma and Ba 2014, arXiv:1412.6980) and AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import optax

from llmjax.train.optimizers.base import Optimizer, eps_problems, rate_problems


@dataclass(frozen=True)
class AdamW(Optimizer):
    """m / (sqrt(v) + eps) with bias-corrected moments m, v of the gradient; weight decay apart from them."""

    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment; 0.95 as in GPT-3 and LLaMA (the paper has 0.999)."""
    eps: float = 1e-8
    """Added to sqrt(v)."""

    def direction(self) -> optax.GradientTransformation:
        """Bias-corrected first moment over the root of the second."""
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "b1", "b2")
        yield from eps_problems(self.eps)


@dataclass(frozen=True)
class Adam(AdamW):
    """Adam; weight decay, if any, is L2 regularisation: it goes through the moments like the gradient."""

    weight_decay: float = 0.0
    """Coefficient of the L2 term's gradient, lambda in lambda/2 |params|^2."""

    decay_is_l2: ClassVar[bool] = True
