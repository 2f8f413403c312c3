"""The linear recurrence function: argument checks, dtypes and segments."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from pallas_kernels.linear_recurrence.registry import choose
from pallas_kernels.segments import check_ids, marks


def linear_recurrence(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "batch length *channels"],
    *,
    initial_state: Inexact[Array, "batch *channels"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
    chunk: int | None = None,
) -> tuple[Inexact[Array, "batch length *channels"], Inexact[Array, "batch *channels"]]:
    """h_t = a_t h_{t-1} + b_t, elementwise, for real or complex a and b; `a` is broadcast to the shape of b.

    With `reverse`, h_t = a_t h_{t+1} + b_t. h is `initial_state` (zero) before the first token. With `segment_ids` the
    state is set to zero where a present token's id is not that of the present token before it, so `initial_state`
    belongs to the first present segment; a negative id marks an absent token, whose a and b may hold anything: the
    state passes it unchanged and its output is 0. The affine maps h -> a h + b compose associatively, (a2, b2) after
    (a1, b1) = (a2 a1, a2 b1 + b2), which is what lets chunks be computed side by side (Blelloch 1990).

    Returns all states in the dtype of b (complex where a or b is) and the last one, which continues the sequence, in
    the dtype of the computation: float32 or complex64, double where an argument is. `chunk`: the tokens of each chunk
    of "xla". `implementation`: "reference", "xla" or some of them in order; None takes the first that can do it.
    Raises ValueError where arguments disagree, NotImplementedError with the reason where no named implementation can
    do it.
    """
    check(a, b, initial_state, chunk)
    check_ids(segment_ids, "b", b)
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    out_dtype = wide if jnp.iscomplexobj(a) else b.dtype
    backend = choose(implementation, chunk)
    found = marks(segment_ids, reverse)
    a, b = a.reshape((1,) * (b.ndim - a.ndim) + a.shape).astype(wide), b.astype(wide)
    if found is not None:
        present, reset = (mark.reshape(mark.shape + (1,) * (b.ndim - 2)) for mark in found)
        a = jnp.where(present, jnp.where(reset, 0, a), 1)
        b = jnp.where(present, b, 0)
    state = jnp.zeros_like(b[:, 0]) if initial_state is None else initial_state.astype(wide)
    states = backend.recurrence(a, b, state, reverse, chunk)
    final = states[:, 0 if reverse else -1]
    states = states if found is None else jnp.where(present, states, 0)
    return states.astype(out_dtype), final


def check(a: Array, b: Array, initial_state: Array | None, chunk: int | None) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the arrays fit together."""
    if b.ndim < 2 or not b.shape[1]:
        raise ValueError(f"b has shape {b.shape}; expected [batch, length, ...] with at least one token")
    if a.ndim > b.ndim or any(n not in (1, m) for n, m in zip(a.shape[::-1], b.shape[::-1])):
        raise ValueError(f"a has shape {a.shape}, b {b.shape}: a must broadcast to b")
    channels = (b.shape[0], *b.shape[2:])
    if initial_state is not None and initial_state.shape != channels:
        raise ValueError(f"initial_state has shape {initial_state.shape}, b {b.shape}: expected {channels}")
    arrays = {"a": a, "b": b} | ({} if initial_state is None else {"initial_state": initial_state})
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(f"{name} of shape {x.shape} has dtype {x.dtype}: expected a float or complex")
    if jnp.iscomplexobj(initial_state) and not (jnp.iscomplexobj(a) or jnp.iscomplexobj(b)):
        raise ValueError(f"initial_state is complex, a {a.dtype} and b {b.dtype} are not")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be positive")
