"""What an implementation is given: checked arrays, absent tokens as zeros, segments as counted resets."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import absent_as_zero, check_ids, marks


class Call(NamedTuple):
    """One call. Decays, states and sums are in the dtype of `state`."""

    query: Float[Array, "batch length groups key_dim"]
    key: Float[Array, "batch length groups key_dim"]
    value: Float[Array, "batch length heads value_dim"]
    log_decay: Float[Array, "batch length heads key_dim"] | Float[Array, "batch length heads 1"]
    bonus: Float[Array, "heads key_dim"] | None
    state: Float[Array, "batch heads key_dim value_dim"]
    runs: Int[Array, "batch length"]
    """How often the state has been reset up to and with each token; the initial state belongs to run 0."""
    scale: float
    chunk: int
    gain: Float[Array, "batch length heads"] | None = None
    """each token writes gain_t k_t v_t^T"""


def with_gained_values(call: Call) -> Call:
    """The same call without a gain: its values are what tokens write, in the dtype of the state."""
    if call.gain is None:
        return call
    return call._replace(value=call.value.astype(call.state.dtype) * call.gain[..., None], gain=None)


def prepare(
    query: Float[Array, "batch length query_heads key_dim"],
    key: Float[Array, "batch length key_heads key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    log_decay: Float[Array, "batch length heads"] | Float[Array, "batch length heads key_dim"] | None,
    bonus: Float[Array, "heads key_dim"] | None,
    initial_state: Float[Array, "batch heads key_dim value_dim"] | None,
    segment_ids: Int[Array, "batch length"] | None,
    scale: float,
    chunk: int,
) -> Call:
    """The call that the arguments mean; raises ValueError where they disagree."""
    check(query, key, value, log_decay, bonus, initial_state, segment_ids, chunk)
    batch, length, heads, value_dim = value.shape
    wide = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    if query.shape[2] != key.shape[2]:
        query, key = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (query, key))
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), wide)
    log_decay = (log_decay if log_decay.ndim == 4 else log_decay[..., None]).astype(wide)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key.shape[3], value_dim), wide)
    found = marks(segment_ids)
    query, key, value, log_decay = (absent_as_zero(found, x) for x in (query, key, value, log_decay))
    runs = jnp.zeros((batch, length), jnp.int32)
    if found is not None:
        runs = jnp.cumsum(found.reset, axis=1, dtype=jnp.int32)
    return Call(query, key, value, log_decay, bonus, initial_state.astype(wide), runs, scale, chunk)


def check(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    bonus: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    chunk: int,
) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the arrays fit together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype}{x.shape}; expected floats [batch, length, heads, dim]")
    batch, length, heads, value_dim = value.shape
    for name, x in (("query", query), ("key", key)):
        if x.shape[:2] != (batch, length) or not x.shape[2] or heads % x.shape[2]:
            raise ValueError(
                f"{name} has shape {x.shape}, value {value.shape}: batch and length must agree, heads divide value's"
            )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query has shape {query.shape}, key {key.shape}: the last axis must agree")
    optional = (
        ("log_decay", log_decay, ((batch, length, heads), (batch, length, heads, key.shape[3]))),
        ("bonus", bonus, ((heads, key.shape[3]),)),
        ("initial_state", initial_state, ((batch, heads, key.shape[3], value_dim),)),
    )
    for name, array, shapes in optional:
        if array is not None and array.shape not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name} has shape {array.shape}, key {key.shape}, value {value.shape}: expected {wanted}")
    check_ids(segment_ids, "value", value)
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk} must be a power of two")
