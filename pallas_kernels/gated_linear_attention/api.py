"""The gated linear attention function."""

from jaxtyping import Array, Float, Int

from pallas_kernels.domain import check_range
from pallas_kernels.gated_linear_attention.call import prepare
from pallas_kernels.gated_linear_attention.registry import choose


def gated_linear_attention(
    query: Float[Array, "batch length groups key_dim"],
    key: Float[Array, "batch length groups key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    log_decay: Float[Array, "batch length heads"] | Float[Array, "batch length heads key_dim"] | None = None,
    *,
    bonus: Float[Array, "heads key_dim"] | None = None,
    scale: float = 1.0,
    initial_state: Float[Array, "batch heads key_dim value_dim"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    implementation: str | tuple[str, ...] | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t.

    g_t = `log_decay` is at most 0 (-inf forgets all), one number a head or one a key dimension. With `bonus` u:
    o_t = scale q_t^T (S_{t-1} + diag(u) k_t v_t^T). Query and key may have fewer heads than value; each is then shared
    by heads / groups heads that follow each other. `initial_state` is S_0, zeros for None. Returns the outputs and the
    state after the last token.

    `segment_ids`: the state is zero before a token whose id is not that of the last token present before it; the
    initial state belongs to the first segment. A token with a negative id is absent: whatever it holds, its output is 0
    and the state passes by it. Decays, states and sums are float32 (float64 where query, key or value is), the output
    is in the dtype of value. `chunk`, a power of two: tokens that "xla" takes at a time; its gradient keeps a state for
    each chunk.

    None: causal linear attention (Katharopoulos et al. 2020, 2006.16236). A constant a head: RetNet (Sun et al. 2023,
    2307.08621), lightning attention (Qin et al. 2024, 2401.04658). A scalar: Mamba-2 (Dao and Gu 2024, 2405.21060, see
    `ssd`). A vector: GLA (Yang et al. 2023, 2312.06635); with bonus RWKV-6 (Peng et al. 2024, 2404.05892).

    `implementation`: "tpu" (chunks of its own), "xla", "quadratic", "reference" or some of them in order; None takes
    the first that fits the platform. Raises ValueError where arguments disagree, NotImplementedError with the reason
    where no named implementation can do it.
    """
    call = prepare(query, key, value, log_decay, bonus, initial_state, segment_ids, scale, chunk)
    check_range("log_decay", call.log_decay, high=0.0)
    out, state = choose(implementation, call).run(call)
    return out.astype(value.dtype), state
