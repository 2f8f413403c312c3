"""Structured state-space duality, the sequence function of Mamba-2, as gated linear attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.domain import check_range
from pallas_kernels.gated_linear_attention.call import prepare
from pallas_kernels.gated_linear_attention.registry import choose
from pallas_kernels.segments import absent_as_zero, marks


def ssd(
    x: Float[Array, "batch length heads head_dim"],
    dt: Float[Array, "batch length heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "batch length groups d_state"],
    C: Float[Array, "batch length groups d_state"],
    D: Float[Array, " heads"] | None = None,
    z: Float[Array, "batch length heads head_dim"] | None = None,
    *,
    dt_bias: Float[Array, " heads"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "batch heads head_dim d_state"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    implementation: str | tuple[str, ...] | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "batch length heads head_dim"], Float[Array, "batch heads head_dim d_state"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = (h_t C_t + D x_t) * silu(z_t), for each head (A at most 0,
    dt at least 0).

    dt is dt + dt_bias, with `dt_softplus` its softplus. States h are [head_dim, d_state]: the transpose of those of
    `gated_linear_attention`, whose query, key and value are C, B and dt x ("tpu" multiplies by dt on chip). A group of
    B and C is shared by heads / groups heads that follow each other. Segments, dtypes, chunk and implementations are
    those of `gated_linear_attention`; the output is in the dtype of x. Dao and Gu 2024 (2405.21060).

    Raises ValueError where arguments disagree.
    """
    check(x, B, C, (dt, A, D, z, dt_bias, initial_state, segment_ids))
    found = marks(segment_ids)
    x_dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    x, dt = absent_as_zero(found, x), absent_as_zero(found, dt).astype(wide)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = jnp.logaddexp(dt, 0) if dt_softplus else dt
    check_range("dt", dt, low=0.0)
    check_range("A", A, high=0.0)
    state = None if initial_state is None else jnp.swapaxes(initial_state, 2, 3)
    call = prepare(C, B, x, dt * A, None, state, segment_ids, 1.0, chunk)._replace(gain=dt)
    out, state = choose(implementation, call).run(call)
    if D is not None:
        out = out + D[:, None] * x
    if z is not None:
        out = out * jax.nn.silu(absent_as_zero(found, z).astype(wide))
    return out.astype(x_dtype), jnp.swapaxes(state, 2, 3)


def check(x: Array, B: Array, C: Array, others: tuple[Array | None, ...]) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the arrays fit together."""
    for name, full in (("x", x), ("B", B), ("C", C)):
        if full.ndim != 4:
            raise ValueError(f"{name} has shape {full.shape}; expected four axes [batch, length, heads, dim]")
    batch, length, heads, head_dim = x.shape
    if B.shape[:2] != (batch, length) or not B.shape[2] or heads % B.shape[2]:
        raise ValueError(f"B has shape {B.shape}, x {x.shape}: batch and length must agree, groups divide heads")
    each, tokens = (heads,), (batch, length, heads)
    shapes = (tokens, each, each, x.shape, each, (batch, heads, head_dim, B.shape[3]), (batch, length))
    names = ("dt", "A", "D", "z", "dt_bias", "initial_state", "segment_ids")
    for name, array, shape in (("C", C, B.shape), *zip(names, others, shapes, strict=True)):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, x {x.shape}, B {B.shape}: expected {shape}")
