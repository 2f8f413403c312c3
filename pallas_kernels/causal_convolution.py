"""Depthwise causal convolution over packed or padded sequences, with the state that continues it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import check_ids, marks


def causal_convolution(
    x: Float[Array, "batch length width"],
    kernel: Float[Array, "taps width"],
    bias: Float[Array, " width"] | None = None,
    *,
    initial_state: Float[Array, "batch taps-1 width"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch taps-1 width"]]:
    """y_t = sum_w kernel_w x_{t - taps + 1 + w} + bias for each channel: the last tap meets the current token.

    `initial_state` are the taps - 1 inputs before the first token (zeros). With `segment_ids` a token sees only those
    of its own segment: a new one begins where a present token's id is not that of the present token before it, and
    `initial_state` belongs to the first. A negative id marks an absent token, which may hold anything: the taps pass
    over it as if it were not there, and its output is 0. Sums are float32, float64 where x is.

    Returns y and the last taps - 1 present inputs of the last segment (of `initial_state` where there are fewer, zeros
    before the beginning of a later segment), which continue the sequence, both in the dtype of x. Raises ValueError
    where arguments disagree.
    """
    check(x, kernel, bias, initial_state)
    check_ids(segment_ids, "x", x)
    batch, length, width = x.shape
    past = kernel.shape[0] - 1
    state = jnp.zeros((batch, past, width), x.dtype) if initial_state is None else initial_state.astype(x.dtype)
    found = marks(segment_ids)
    if found is None:
        inputs = jnp.concatenate([state, x], axis=1)
        return convolve(inputs, kernel, bias, None).astype(x.dtype), inputs[:, length:]
    present = found.present[..., None]
    # Present tokens first, in their order: then the taps count tokens, wherever absent ones stand.
    order = jnp.argsort(~found.present, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    inputs = jnp.concatenate([state, permuted(jnp.where(present, x, 0), order, back)], axis=1)
    run = jnp.take_along_axis(jnp.cumsum(found.reset, axis=1, dtype=jnp.int32), order, axis=1)
    run = jnp.pad(run, ((0, 0), (past, 0)))
    y = permuted(convolve(inputs, kernel, bias, run), back, order)
    last = jnp.sum(found.present, axis=1, keepdims=True, dtype=jnp.int32) + jnp.arange(past, dtype=jnp.int32)
    kept = jnp.take_along_axis(run, last, axis=1) == jnp.max(run, axis=1, keepdims=True)
    final = jnp.where(kept[..., None], jnp.take_along_axis(inputs, last[..., None], axis=1), 0)
    return jnp.where(present, y, 0).astype(x.dtype), final


def convolve(
    inputs: Float[Array, "batch past+length width"],
    kernel: Float[Array, "taps width"],
    bias: Float[Array, " width"] | None,
    run: Int[Array, "batch past+length"] | None,
) -> Float[Array, "batch length width"]:
    """The sum over taps, of the inputs in a token's own `run` where there are runs."""
    wide = jnp.promote_types(inputs.dtype, jnp.float32)
    taps, width = kernel.shape
    length = inputs.shape[1] - taps + 1
    y = jnp.zeros((inputs.shape[0], length, width), wide) if bias is None else bias.astype(wide)
    for w in range(taps):
        seen = inputs[:, w : w + length].astype(wide)
        if run is not None:
            seen = jnp.where((run[:, w : w + length] == run[:, taps - 1 :])[..., None], seen, 0)
        y = y + kernel[w].astype(wide) * seen
    return y


@jax.custom_vjp
def permuted(
    x: Float[Array, "batch length width"], order: Int[Array, "batch length"], back: Int[Array, "batch length"]
) -> Float[Array, "batch length width"]:
    """The tokens in another order; the gradient takes them `back`, where that of indexing would add them up."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def save(x: Array, order: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    """The permuted tokens, and what the backward pass needs."""
    return permuted(x, order, back), (order, back)


def gradient(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    """The inverse permutation."""
    order, back = saved
    return permuted(cotangent, back, order), None, None


permuted.defvjp(save, gradient)


def check(x: Array, kernel: Array, bias: Array | None, initial_state: Array | None) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the arrays fit together."""
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}; expected [batch, length, width]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x of shape {x.shape} has dtype {x.dtype}: expected a float")
    batch, _, width = x.shape
    if kernel.ndim != 2 or not kernel.shape[0] or kernel.shape[1] != width:
        raise ValueError(f"kernel has shape {kernel.shape}, x {x.shape}: expected [taps, width] with at least one tap")
    for name, value, shape in (
        ("bias", bias, (width,)),
        ("initial_state", initial_state, (batch, len(kernel) - 1, width)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, x {x.shape}, kernel {kernel.shape}: expected {shape}")
