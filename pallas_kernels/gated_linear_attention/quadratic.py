"""Gated linear attention as a masked attention matrix: for tests and short lengths."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear_attention.call import Call, with_gained_values
from pallas_kernels.gated_linear_attention.spans import after, between, up_to


def refusal(call: Call) -> str | None:
    """Nothing."""
    return None


def run(
    call: Call,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """The semiseparable matrix times v; O(length^2) memory a head, times key_dim where the decay is a vector."""
    call = with_gained_values(call)
    wide, heads = call.state.dtype, call.value.shape[2]
    query, key, value, decay = (by_head(x, heads).astype(wide) for x in call[:4])
    query, exclusive = query * call.scale, call.bonus is not None
    same = (call.runs[:, :, None] == call.runs[:, None, :])[:, None]
    out = jnp.where(same, decayed_matrix(query, key, decay, exclusive), 0) @ value
    if call.bonus is not None:
        out = out + jnp.sum(query * call.bonus[:, None] * key, axis=-1, keepdims=True) * value
    runs = call.runs[:, None, :, None]
    last = runs[:, :, -1:]
    out = out + jnp.where(runs == 0, (query * jnp.exp(up_to(decay, exclusive))) @ call.state, 0)
    written = jnp.swapaxes(jnp.where(runs == last, key * jnp.exp(after(decay)), 0), -1, -2) @ value
    kept = jnp.exp(jnp.sum(decay, axis=-2))[..., None] * call.state
    return jnp.moveaxis(out, 1, 2), jnp.where(last == 0, kept, 0) + written


def by_head(x: Float[Array, "batch length groups dim"], heads: int) -> Float[Array, "batch heads length dim"]:
    """The array of every head."""
    return jnp.repeat(jnp.moveaxis(x, 2, 1), heads // x.shape[2], axis=1)


def decayed_matrix(
    query: Float[Array, "batch heads length key_dim"],
    key: Float[Array, "batch heads length key_dim"],
    decay: Float[Array, "batch heads length key_dim"] | Float[Array, "batch heads length 1"],
    exclusive: bool,
) -> Float[Array, "batch heads length length"]:
    """[i, j]: q_i^T diag(exp(sum of decay after j up to i)) k_j for j <= i; exclusive: for j < i, up to before i."""
    weights = jnp.exp(between(jnp.swapaxes(decay, -1, -2), exclusive))
    if decay.shape[-1] == 1:
        matrix = (query @ jnp.swapaxes(key, -1, -2)) * weights[:, :, 0]
    else:
        matrix = jnp.einsum("bhik,bhkij,bhjk->bhij", query, weights, key)
    return jnp.tril(matrix, -1 if exclusive else 0)


def semiseparable_matrix(
    log_decay: Float[Array, "batch length heads"] | Float[Array, "batch length heads d_state"],
    B: Float[Array, "batch length groups d_state"],
    C: Float[Array, "batch length groups d_state"],
) -> Float[Array, "batch heads length length"]:
    """The matrix of a state-space model, M_ij = C_i^T diag(exp(sum of log_decay_l over j < l <= i)) B_j for j <= i.

    y = M x is the recurrence h_t = exp(log_decay_t) h_{t-1} + B_t x_t, y_t = C_t^T h_t. Every block of it on and below
    the diagonal has a rank of at most d_state. Groups divide heads. Dao and Gu 2024 (2405.21060), section 3.
    """
    heads = log_decay.shape[2]
    decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    return decayed_matrix(by_head(C, heads), by_head(B, heads), jnp.moveaxis(decay, 1, 2), exclusive=False)
