"""Loss scaling for float16: multiply the loss by S, divide the gradients by S, skip steps that overflow.

Micikevicius 2017 (arXiv:1710.03740). float16 holds nothing above 65504 and nothing below 2^-24 = 5.96e-8, so unscaled
gradients vanish. The dynamic scale follows PyTorch's GradScaler: halved after an overflow, doubled after exactly
`interval` good steps in a row (flax's DynamicScale with growth_interval = interval - 1 gives the same trace).
Everything here is a pure function of a small state, and the gradients of a whole accumulated batch are unscaled once.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

T = TypeVar("T")


class LossScaleState(NamedTuple):
    """The scale in use and how long it has gone well."""

    scale: Float[Array, ""]
    """S, float32."""
    good_steps: Int[Array, ""]
    """Steps in a row with finite gradients since the scale last changed, int32."""


@dataclass(frozen=True)
class LossScale(ABC):
    """Base of the loss scalings."""

    scale: float = 2.0**16
    """Initial factor S on the loss."""

    def init(self) -> LossScaleState:
        """State before the first step."""
        return LossScaleState(scale=jnp.float32(self.scale), good_steps=jnp.zeros((), jnp.int32))

    @abstractmethod
    def next(self, state: LossScaleState, finite: Bool[Array, ""]) -> LossScaleState:
        """State for the next step, given whether this step's gradients were finite."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if not self.scale > 0:
            yield "scale", "is not positive: use for example 65536"


@dataclass(frozen=True)
class Static(LossScale):
    """The same factor at every step; overflowing steps are still skipped."""

    scale: float = 1024.0
    """Factor S on the loss."""

    def next(self, state: LossScaleState, finite: Bool[Array, ""]) -> LossScaleState:
        """The scale stays; good steps are counted."""
        return state._replace(good_steps=jnp.where(finite, state.good_steps + 1, 0))


@dataclass(frozen=True)
class Dynamic(LossScale):
    """Back off on overflow, grow after a run of good steps."""

    growth: float = 2.0
    """Factor on S after `interval` good steps in a row."""
    backoff: float = 0.5
    """Factor on S after an overflow."""
    interval: int = 2000
    """Good steps in a row before S grows."""
    minimum: float = 1.0
    """S never falls below this."""

    def next(self, state: LossScaleState, finite: Bool[Array, ""]) -> LossScaleState:
        """Grow, keep or back off; the scale stays within [minimum, largest float32]."""
        grow = finite & (state.good_steps + 1 >= self.interval)
        largest = jnp.finfo(jnp.float32).max
        grown = jnp.where(grow, jnp.minimum(state.scale * self.growth, largest), state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale * self.backoff, self.minimum))
        return LossScaleState(scale=scale, good_steps=jnp.where(finite & ~grow, state.good_steps + 1, 0))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        if not self.growth > 1:
            yield "growth", "is not above 1: use for example 2"
        if not 0 < self.backoff < 1:
            yield "backoff", "is not in (0, 1): use for example 0.5"
        if self.interval < 1:
            yield "interval", "is below 1: use for example 2000"
        if not self.minimum > 0:
            yield "minimum", "is not positive: use for example 1"


def scale_loss(state: LossScaleState, loss: Float[Array, ""]) -> Float[Array, ""]:
    """The loss times S: what is differentiated."""
    return loss * state.scale


def unscale(state: LossScaleState, gradients: PyTree) -> PyTree:
    """Gradients of the scaled loss divided by S, in float32. Call once, after accumulation."""
    return jax.tree.map(lambda g: g.astype(jnp.float32) / state.scale, gradients)


def keep_if(condition: Bool[Array, ""], new: T, old: T) -> T:
    """`new` where the condition holds, else `old`, leaf by leaf: how a step is skipped inside one compiled function."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
