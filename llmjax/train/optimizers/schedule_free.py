"""Schedule-free AdamW (Defazio 2024, arXiv:2405.15682): averaging of iterates in place of a decaying learning rate.

Three sequences: z takes Adam's steps, x is the weighted average of z, and y = (1 - b1) z + b1 x is where gradients
are taken. The training parameters are y; evaluate and sample with x, which `eval_params` returns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import optax
from jaxtyping import Array, Float, PyTree

from llmjax.train.optimizers.base import Optimizer, Setting, eps_problems, rate_problems
from llmjax.train.schedules import Constant, Schedule


@dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """AdamW without first moment, its iterates interpolated and averaged; weight decay is taken at y."""

    schedule: Schedule = Constant(learning_rate=2.5e-3, warmup=0.05)
    """Learning rate by step: warmup, then constant."""
    b1: float = 0.9
    """Weight of the average x in y; takes the place of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to sqrt(v)."""
    weight_power: float = 2.0
    """Iterates are averaged with weight lr_max ** weight_power, so that those of the warmup count little."""

    def rule(
        self, learning_rate: float | Float[Array, ""], settings: dict[str, Setting]
    ) -> optax.GradientTransformation:
        """Adam's rule (for z), wrapped in the averaging."""
        inner = super().rule(learning_rate, settings)
        return optax.contrib.schedule_free(inner, learning_rate, b1=self.b1, weight_lr_power=self.weight_power)

    def direction(self) -> optax.GradientTransformation:
        """Gradient over the root of the bias-corrected second moment."""
        return optax.scale_by_adam(b1=0.0, b2=self.b2, eps=self.eps)

    def eval_params(self, opt_state: PyTree, params: PyTree) -> PyTree:
        """The average x; frozen parameters as they are."""
        kind = optax.contrib.ScheduleFreeState
        nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
        (state,) = [node for node in nodes if isinstance(node, kind)]
        y = jax.tree.map(lambda param, z: z if isinstance(z, optax.MaskedNode) else param, params, state.z)
        x = optax.contrib.schedule_free_eval_params(state, y)
        return jax.tree.map(lambda param, x: param if isinstance(x, optax.MaskedNode) else x, params, x)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "b2")
        yield from eps_problems(self.eps)
        if not 0 < self.b1 < 1:
            yield "b1", "is not in (0, 1): use for example 0.9"
        if self.weight_power < 0:
            yield "weight_power", "is negative: use 2.0"
