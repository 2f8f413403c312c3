"""Exponential moving average of the parameters, kept in float32 beside them (Polyak and Juditsky 1992).

    average_t = decay * average_{t-1} + (1 - decay) * params_t

With `debias` the average starts at zero and is divided by 1 - decay^t when read, so that after one update it equals the
parameters; without, it starts as a copy of the initial parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree


class EmaState(NamedTuple):
    """The running average."""

    updates: Int[Array, ""]
    """Updates so far, int32."""
    average: PyTree
    """Tree like the parameters, float32."""


@dataclass(frozen=True)
class Ema:
    """Moving average of the parameters, used for evaluation."""

    decay: float = 0.999
    """Weight of the past in [0, 1); the average looks back over about 1 / (1 - decay) updates."""
    debias: bool = True
    """Start from zero and correct for it when reading, instead of starting from the initial parameters."""

    def init(self, params: PyTree) -> EmaState:
        """State before the first update; its arrays are copies, so that `params` may be donated."""
        start = jnp.zeros_like if self.debias else jnp.array
        average = jax.tree.map(lambda p: start(p, dtype=jnp.float32), params)
        return EmaState(updates=jnp.zeros((), jnp.int32), average=average)

    def update(self, state: EmaState, params: PyTree) -> EmaState:
        """Take in the parameters after an optimizer step."""
        average = optax.tree.update_moment(optax.tree.cast(params, jnp.float32), state.average, self.decay, 1)
        return EmaState(updates=state.updates + 1, average=average)

    def params(self, state: EmaState) -> PyTree:
        """Averaged parameters, float32. With `debias`, at least one update must have been made."""
        return optax.tree.bias_correction(state.average, self.decay, state.updates) if self.debias else state.average

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if not 0 <= self.decay < 1:
            yield "decay", "is not in [0, 1): use for example 0.999"
