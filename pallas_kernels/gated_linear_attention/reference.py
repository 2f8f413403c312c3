"""The definition of gated linear attention: the recurrence, one token after the other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear_attention.call import Call, with_gained_values


def refusal(call: Call) -> str | None:
    """Nothing."""
    return None


def run(
    call: Call,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = scale q_t^T S_t, or q_t^T (S_{t-1} + diag(u) k_t v_t^T)."""
    call = with_gained_values(call)
    heads, wide = call.value.shape[2], call.state.dtype
    query, key = (jnp.repeat(x.astype(wide), heads // x.shape[2], axis=2) for x in (call.query, call.key))
    before = jnp.pad(call.runs, ((0, 0), (1, 0)))[:, :-1]
    tokens = (query, key, call.value.astype(wide), call.log_decay, call.runs != before)

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        query, key, value, log_decay, reset = token
        state = jnp.where(reset[:, None, None, None], 0, state)
        write = key[..., None] * value[..., None, :]
        after = jnp.exp(log_decay)[..., None] * state + write
        read = after if call.bonus is None else state + call.bonus[..., None] * write
        return after, call.scale * jnp.einsum("bhk,bhkv->bhv", query, read)

    state, out = jax.lax.scan(step, call.state, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
    return jnp.moveaxis(out, 0, 1), state
