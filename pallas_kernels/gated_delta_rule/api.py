"""The gated delta rule function."""

from jaxtyping import Array, Float, Int

from pallas_kernels.domain import check_range
from pallas_kernels.gated_delta_rule.registry import choose
from pallas_kernels.gated_linear_attention.call import prepare
from pallas_kernels.segments import absent_as_zero, marks


def gated_delta_rule(
    query: Float[Array, "batch length groups key_dim"],
    key: Float[Array, "batch length groups key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    beta: Float[Array, "batch length heads"],
    log_decay: Float[Array, "batch length heads"] | Float[Array, "batch length heads key_dim"] | None = None,
    *,
    scale: float = 1.0,
    initial_state: Float[Array, "batch heads key_dim value_dim"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    implementation: str | tuple[str, ...] | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """P_t = diag(exp(g_t)) S_{t-1}, S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T, o_t = scale q_t^T S_t.

    The part beta_t of what the decayed state P_t holds under the key k_t is replaced by v_t, where the key has length
    1; keys are taken as they are. beta_t lies between 0 and 2, above 1 with eigenvalues below 0. g_t = `log_decay` is
    at most 0 (-inf forgets all), one number a head or one a key dimension. Query and key may have fewer heads than
    value; each is then shared by heads / groups heads that follow each other. Returns the outputs and the state after
    the last token.

    `initial_state`, `segment_ids`, dtypes and `chunk` are those of `gated_linear_attention`.

    Without decay: DeltaNet (Yang et al. 2024, 2406.06484). A scalar: Gated DeltaNet (Yang et al. 2024, 2412.06464). A
    vector: Kimi Delta Attention (Kimi Team 2025, 2510.26692).

    `implementation`: "tpu", "xla", "reference" or some of them in order; None takes the first that fits the platform.
    Raises ValueError where arguments disagree, NotImplementedError with the reason where no named implementation can do
    it.
    """
    call = prepare(query, key, value, log_decay, None, initial_state, segment_ids, scale, chunk)
    if beta.shape != value.shape[:3]:
        raise ValueError(f"beta has shape {beta.shape}, value {value.shape}: expected [batch, length, heads]")
    beta = absent_as_zero(marks(segment_ids), beta)
    check_range("log_decay", call.log_decay, high=0.0)
    check_range("beta", beta, 0.0, 2.0)
    out, state = choose(implementation, call).run(call, beta)
    return out.astype(value.dtype), state
