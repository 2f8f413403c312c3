"""The definition of the gated delta rule: the recurrence, one token after the other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear_attention.call import Call


def refusal(call: Call) -> str | None:
    """Nothing."""
    return None


def run(
    call: Call, beta: Float[Array, "batch length heads"]
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """P_t = diag(exp(g_t)) S_{t-1}, S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T, o_t = scale q_t^T S_t."""
    heads, wide = call.value.shape[2], call.state.dtype
    query, key = (jnp.repeat(x.astype(wide), heads // x.shape[2], axis=2) for x in (call.query, call.key))
    before = jnp.pad(call.runs, ((0, 0), (1, 0)))[:, :-1]
    tokens = (query, key, call.value.astype(wide), beta.astype(wide), call.log_decay, call.runs != before)

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        query, key, value, beta, log_decay, reset = token
        decayed = jnp.exp(log_decay)[..., None] * jnp.where(reset[:, None, None, None], 0, state)
        wrong = value - jnp.einsum("bhk,bhkv->bhv", key, decayed)
        state = decayed + (beta[..., None] * key)[..., None] * wrong[..., None, :]
        return state, call.scale * jnp.einsum("bhk,bhkv->bhv", query, state)

    state, out = jax.lax.scan(step, call.state, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
    return jnp.moveaxis(out, 0, 1), state
