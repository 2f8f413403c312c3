"""Where a packed or padded sequence has tokens, and where a recurrence over it begins anew."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Marks(NamedTuple):
    """What segment ids mean to a recurrence."""

    present: Bool[Array, "batch length"]
    """the id is not negative: absent tokens add nothing, leave the state as it is and give 0"""
    reset: Bool[Array, "batch length"]
    """the token is present and its id is not that of the present token before it: the state is zero before it"""


def marks(segment_ids: Int[Array, "batch length"] | None, reverse: bool = False) -> Marks | None:
    """The marks of `segment_ids`, with `reverse` for a recurrence that runs from the last token to the first.

    The first present token is no reset: the initial state belongs to its segment.
    """
    if segment_ids is None:
        return None
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    present = ids >= 0
    latest = jax.lax.cummax(jnp.where(present, jnp.arange(ids.shape[1], dtype=jnp.int32), -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    id_before = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
    found = Marks(present, present & (before >= 0) & (id_before != ids))
    return Marks(*(jnp.flip(mark, 1) for mark in found)) if reverse else found


def absent_as_zero(found: Marks | None, x: Float[Array, "batch length ..."]) -> Float[Array, "batch length ..."]:
    """`x` with zeros for absent tokens, whose gradient is zero too."""
    if found is None:
        return x
    return jnp.where(found.present.reshape(*found.present.shape, *(1,) * (x.ndim - 2)), x, 0)


def check_ids(segment_ids: Array | None, name: str, values: Array) -> None:
    """Raise ValueError unless there is an integer id for every token of `values` [batch, length, ...]."""
    if segment_ids is None:
        return
    if segment_ids.shape != values.shape[:2]:
        raise ValueError(f"segment_ids has shape {segment_ids.shape}, {name} {values.shape}: expected [batch, length]")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids of shape {segment_ids.shape} has dtype {segment_ids.dtype}: expected integers")
