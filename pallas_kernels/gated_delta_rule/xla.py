"""The gated delta rule in plain XLA: a triangular system within chunks of tokens, a loop that carries the state."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear_attention.call import Call
from pallas_kernels.gated_linear_attention.xla import Rows, State, chunk_step, from_state, over_chunks, within


def refusal(call: Call) -> str | None:
    """Nothing."""
    return None


def run(
    call: Call, beta: Float[Array, "batch length heads"]
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """The chunked form: gated linear attention of the values u_t = beta_t (v_t - P_t^T k_t) that are written.

    P_t is what the chunk's first state and the u before t have left, so that the u of a chunk solve a unit lower
    triangular system, (I + diag(beta) L) U = diag(beta) (V - K~ S) with L_ij = k_i^T diag(decay from j to i) k_j for
    j < i. Yang et al. 2024 (2406.06484), section 3; Yang et al. 2024 (2412.06464), section 3.3.
    """

    def step(state: State, chunk: tuple[Array, ...]) -> tuple[State, Rows]:
        query, key, value, beta, decay, runs = chunk
        system = beta * jnp.tril(within(key, key, decay, runs, exclusive=False), -1)
        written = inverse(system) @ (beta * (value - from_state(key, decay, runs, state)))
        return chunk_step(state, query, key, written, decay, runs, scale=call.scale)

    return over_chunks(step, call, (call.query, call.key, call.value, beta[..., None], call.log_decay))


@jax.custom_jvp
def inverse(lower: Float[Array, "... chunk chunk"]) -> Float[Array, "... chunk chunk"]:
    """(I + L)^-1 of strictly lower triangular L, the chunk being a power of two.

    By doubling: blocks with inverses X are joined in pairs by X - X M X, where M is what L has between the two.
    """
    index = jnp.arange(lower.shape[-1])
    solved = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    for size in (1 << level for level in range((lower.shape[-1] - 1).bit_length())):
        block = index // size
        joined = (block[:, None] == block + 1) & (block[:, None] % 2 == 1)
        solved = solved - solved @ jnp.where(joined, lower, 0) @ solved
    return solved


@inverse.defjvp
def inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """dX = -X dL X."""
    solved = inverse(*primals)
    return solved, -(solved @ tangents[0] @ solved)
