"""cuDNN's fused attention through `jax.nn`, refused wherever it would compute something else."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.attention.call import Call

MAX_HEAD_DIM = 128
"""Larger heads need Hopper forward and newer versions backward: what is refused here is never found out at run time."""


def refusal(call: Call) -> str | None:
    """Why cuDNN cannot take this call, or None."""
    query, key, value, bias, sinks = call.operands
    batch, length, _, head_dim = query.shape
    reasons = {
        "needs bfloat16 or float16": query.dtype not in (jnp.bfloat16, jnp.float16),
        f"takes head_dim up to {MAX_HEAD_DIM}, a multiple of 8": head_dim > MAX_HEAD_DIM or head_dim % 8 != 0,
        "needs key and value of one head_dim": value.shape[3] != head_dim,
        "has no soft cap": call.rule.soft_cap is not None,
        "has no sinks": sinks is not None,
        "takes no segment_ids": call.mask.segment_ids is not None,
        "takes no positions": call.mask.positions is not None,
        "leaves rows without a key undefined under a dense mask": call.mask.dense is not None,
        "windows only to the left, and causally": call.rule.window is not None and not call.rule.causal,
        "rounds its log-sum-exp and has no gradient for it": call.residual,
        "differentiates a bias only in a batch of 1": bias is not None and batch > 1,
        "takes a bias only for even lengths": bias is not None and bool(length % 2 or key.shape[1] % 2),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def run(call: Call) -> tuple[Array, None]:
    """The output; there is no log-sum-exp. Queries beyond their length, and those without keys, are zeros."""
    query, key, value, bias, _ = call.operands
    counts = (call.mask.query_seq_lengths, call.mask.key_value_seq_lengths)
    left, _ = call.rule.window or (None, None)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (1, query.shape[2], query.shape[1], key.shape[1])).astype(query.dtype)
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        scale=call.rule.scale,
        is_causal=call.rule.causal,
        query_seq_lengths=counts[0],
        key_value_seq_lengths=counts[1],
        local_window_size=None if left is None else (left, 0),
        implementation="cudnn",
    )
    if counts[0] is not None:
        out = jnp.where((jnp.arange(query.shape[1])[None] < counts[0][:, None])[..., None, None], out, 0)
    if counts[1] is not None:
        out = jnp.where((counts[1] > 0)[:, None, None, None], out, 0)
    return out, None
