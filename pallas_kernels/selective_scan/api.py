"""The selective scan function: argument checks and segments."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.domain import check_range
from pallas_kernels.segments import check_ids, marks
from pallas_kernels.selective_scan.inputs import Tokens, Weights, prepared, wide_type
from pallas_kernels.selective_scan.registry import choose


def selective_scan(
    x: Float[Array, "batch length width"],
    dt: Float[Array, "batch length width"],
    A: Float[Array, "width state"],
    B: Float[Array, "batch length groups state"],
    C: Float[Array, "batch length groups state"],
    D: Float[Array, " width"] | None = None,
    z: Float[Array, "batch length width"] | None = None,
    *,
    dt_bias: Float[Array, " width"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "batch width state"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width state"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = (C_t . h_t + D x_t) silu(z_t) (Gu and Dao 2023, 2312.00752).

    Each channel of x has a state of its own, diagonal in A; consecutive width / groups channels share a group's B and
    C. dt is dt + `dt_bias`, with `dt_softplus` softplus(dt + dt_bias), and at least 0; A is at most 0. With `reverse`
    time runs from the last token to the first. h is `initial_state` (zero) before the first token. With `segment_ids`
    the state is set to zero where a present token's id is not that of the present token before it, so `initial_state`
    belongs to the first present segment; a negative id marks an absent token, which may hold anything: the state passes
    it unchanged and its output is 0. States, decays and sums are float32, float64 where x is.

    Returns y in the dtype of x and the last state, which continues the sequence, in the dtype of the states.
    `implementation`: "tpu", "xla", "hopper", "reference" or some of them in order; None takes the first that can do it
    (the Hopper kernels must be asked for). Raises ValueError where arguments disagree, NotImplementedError with the
    reason where no named implementation can do it.
    """
    check_tokens(x, dt, B, C, z)
    check_weights(x, A, B, D, dt_bias, initial_state)
    check_ids(segment_ids, "x", x)
    tokens, weights = Tokens(x, dt, B, C, z, marks(segment_ids, reverse)), Weights(A, D, dt_bias)
    check_range("A", A, high=0.0)
    check_range("dt", prepared(tokens, dt_bias, dt_softplus).dt, low=0.0)
    backend = choose(implementation, tokens, weights)
    wide = wide_type(x)
    shape = (x.shape[0], *A.shape)
    state = jnp.zeros(shape, wide) if initial_state is None else initial_state.astype(wide)
    y, final = backend.scan(tokens, weights, state, reverse, dt_softplus)
    return y.astype(x.dtype), final


def check_tokens(x: Array, dt: Array, B: Array, C: Array, z: Array | None) -> None:
    """Raise ValueError, naming the argument and both shapes, unless all have the same tokens and channels."""
    if x.ndim != 3 or not x.shape[1]:
        raise ValueError(f"x has shape {x.shape}; expected [batch, length, width] with at least one token")
    for name, value in {"dt": dt, "z": z}.items():
        if value is not None and value.shape != x.shape:
            raise ValueError(f"{name} has shape {value.shape}, x {x.shape}: they must agree")
    if B.ndim != 4 or B.shape[:2] != x.shape[:2]:
        raise ValueError(f"B has shape {B.shape}, x {x.shape}: expected [batch, length, groups, state]")
    if C.shape != B.shape:
        raise ValueError(f"C has shape {C.shape}, B {B.shape}: they must agree")
    if not B.shape[2] or x.shape[2] % B.shape[2]:
        raise ValueError(f"B has shape {B.shape}, x {x.shape}: groups must divide width")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x of shape {x.shape} has dtype {x.dtype}: expected a float")


def check_weights(
    x: Array, A: Array, B: Array, D: Array | None, dt_bias: Array | None, initial_state: Array | None
) -> None:
    """Raise ValueError, naming the argument and both shapes, unless there is a weight for each channel of x."""
    width, state = x.shape[2], B.shape[3]
    shapes = {"A": (width, state), "D": (width,), "dt_bias": (width,), "initial_state": (x.shape[0], width, state)}
    for (name, shape), value in zip(shapes.items(), (A, D, dt_bias, initial_state)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, x {x.shape} and B {B.shape}: expected {shape}")
