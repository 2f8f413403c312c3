"""Sophia-H (Liu 2023, arXiv:2305.14342): momentum over a running estimate of the Hessian's diagonal, clipped.

Every `interval` updates the diagonal is estimated on the current batch by Hutchinson's u * (H u) with random signs u
(unbiased), at the cost of one Hessian-vector product; the training step therefore hands the batch's loss to `update`
as `obj_fn`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import jax
import optax
from jaxtyping import Array, Float, PyTree

from llmjax.train.optimizers.base import Optimizer, eps_problems, rate_problems


@dataclass(frozen=True)
class Sophia(Optimizer):
    """clip(m / max(gamma * h, eps), -1, 1): m the averaged gradient, h the averaged Hessian diagonal."""

    b1: float = 0.965
    """Decay rate of the gradient average."""
    b2: float = 0.99
    """Decay rate of the Hessian average, per estimate."""
    gamma: float = 0.01
    """Multiple of the Hessian; larger means fewer clipped coordinates."""
    eps: float = 1e-12
    """Least denominator: where the curvature is not positive the update is the sign of m."""
    interval: int = 10
    """Updates between Hessian estimates."""

    needs_objective: ClassVar[bool] = True

    def transform(
        self, learning_rate: float | Float[Array, ""], params: PyTree
    ) -> optax.GradientTransformationExtraArgs:
        """As for every optimizer, with `obj_fn` (parameters -> loss) required by `update`."""
        inner = super().transform(learning_rate, params)

        def update(
            updates: PyTree, state: PyTree, params: PyTree, *, obj_fn: Callable[[PyTree], Float[Array, ""]]
        ) -> tuple[PyTree, PyTree]:
            def objective(trained: PyTree) -> Float[Array, ""]:
                return obj_fn(jax.tree.map(_unmask, params, trained))

            return inner.update(updates, state, params, obj_fn=objective)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    def direction(self) -> optax.GradientTransformation:
        """Clipped ratio of momentum and curvature; optax exports it with the sign of a descent, undone here."""
        sophia = optax.contrib.sophia(
            learning_rate=1.0,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=0.0,
            gamma=self.gamma,
            update_interval=self.interval,
        )
        return optax.chain(sophia, optax.scale(-1.0))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "b1", "b2")
        yield from eps_problems(self.eps)
        if not self.gamma > 0:
            yield "gamma", "is not positive: use for example 0.01"
        if self.interval < 1:
            yield "interval", "is below 1: use for example 10"


def _unmask(param: Float[Array, "..."], trained: Float[Array, "..."] | optax.MaskedNode) -> Float[Array, "..."]:
    """The trained value, or the parameter itself where it is frozen."""
    return param if isinstance(trained, optax.MaskedNode) else trained
