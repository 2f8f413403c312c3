"""The arrays of a selective scan as every implementation receives them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.segments import Marks


class Tokens(NamedTuple):
    """What belongs to tokens."""

    x: Float[Array, "batch length width"]
    dt: Float[Array, "batch length width"]
    B: Float[Array, "batch length groups state"]
    C: Float[Array, "batch length groups state"]
    z: Float[Array, "batch length width"] | None
    marks: Marks | None


class Weights(NamedTuple):
    """What all tokens share."""

    A: Float[Array, "width state"]
    D: Float[Array, " width"] | None
    dt_bias: Float[Array, " width"] | None


def wide_type(x: Array) -> jnp.dtype:
    """The dtype of the states."""
    return jnp.promote_types(x.dtype, jnp.float32)


def prepared(tokens: Tokens, dt_bias: Array | None, dt_softplus: bool) -> Tokens:
    """In float32 or wider, with the steps that the recurrence takes; all values of absent tokens are zero."""
    wide = wide_type(tokens.x)
    present = None if tokens.marks is None else tokens.marks.present

    def cleared(values: Array) -> Array:
        values = values.astype(wide)
        return values if present is None else jnp.where(jnp.expand_dims(present, range(2, values.ndim)), values, 0)

    # Before the softplus as well: what an absent token holds would come back through its gradient.
    dt = cleared(tokens.dt)
    dt = dt if dt_bias is None else dt + dt_bias.astype(wide)
    dt = cleared(jax.nn.softplus(dt) if dt_softplus else dt)
    z = None if tokens.z is None else cleared(tokens.z)
    return Tokens(cleared(tokens.x), dt, cleared(tokens.B), cleared(tokens.C), z, tokens.marks)


def finished(readout: Array, tokens: Tokens, D: Array | None) -> Array:
    """(readout + D x) silu(z)."""
    y = readout if D is None else readout + D.astype(readout.dtype) * tokens.x
    return y if tokens.z is None else y * jax.nn.silu(tokens.z)
