"""Attention in plain XLA on any platform: short sequences by blocks of queries, long ones by tiles of scores."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Rule, Seen, allowed, ends
from pallas_kernels.attention.reference import dense_attention
from pallas_kernels.attention.tiled import Config, tiled_backward, tiled_forward
from pallas_kernels.attention.vjp import Kernel, Operands, Visible, blockwise

SHORT = 1024
"""Up to the square of this many scores a head, the weights are kept and the gradient is the automatic one."""
BLOCKS = 4
"""Blocks of a short sequence: more skip more of the upper triangle, and make more and smaller products."""
UNDIVIDED = 63
"""Up to this many queries are one block: its products cost less than to start several."""


def xla_attention(
    operands: Operands, visible: Visible, rule: Rule, config: Config | None
) -> tuple[Float[Array, "batch query_length heads value_dim"], Float[Array, "batch heads query_length"]]:
    """Output and log-sum-exp. Without a `config` the lengths choose between the two forms.

    The tiled form keeps batch * heads * block_q * block_k scores at a time, forward and backward, and is differentiable
    once. Rabe and Staats 2021 (2112.05682), Liu et al. 2023 (2310.01889).
    """
    scores = operands.query.shape[1] * operands.key.shape[1]
    if config is None and scores <= SHORT**2:
        return laid_out(operands, visible, rule)
    return blockwise(Kernel(tiled_forward, tiled_backward, rule, config or Config()), operands, visible)


def laid_out(operands: Operands, visible: Visible, rule: Rule) -> tuple[Array, Array]:
    """Dense attention of up to four blocks of queries; keys that no query of a block may see are not computed."""
    query, key, value, bias, sinks = operands
    length = query.shape[1]
    tokens = ends(visible.seen, (length, key.shape[1]))
    square = visible.seen.positions is None and length == key.shape[1]
    divided = square and (rule.causal or rule.window) and length > UNDIVIDED
    size = -(-length // BLOCKS) if divided else length
    # Widened, so that the gradients of the blocks are summed in float32.
    wide_key, wide_value = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (key, value))
    parts = []
    for start in range(0, length, size):
        rows = slice(start, start + size)
        columns = reachable(rule, start, start + size) if square else slice(None)
        mask = allowed(rule, cut(tokens, rows, columns))[:, None]
        if visible.dense is not None:
            mask = mask & tile(visible.dense, rows, columns)
        some_empty = not square or visible.seen.segments is not None or visible.dense is not None
        k, v = wide_key[:, columns].astype(key.dtype), wide_value[:, columns].astype(value.dtype)
        scores = None if bias is None else tile(bias, rows, columns)
        part = dense_attention(query[:, rows], k, v, scores, mask, sinks, rule.scale, rule.soft_cap, some_empty)
        parts.append(part)
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)


def reachable(rule: Rule, start: int, stop: int) -> slice:
    """The keys that queries start to stop - 1 may see, positions being indices."""
    left, right = rule.window or (None, None)
    first = 0 if left is None else max(start - left, 0)
    if rule.causal:
        return slice(first, stop)
    return slice(first, None if right is None else stop + right)


def cut(tokens: Seen, rows: slice, columns: slice) -> Seen:
    """Positions and segments of some queries and keys."""
    where, ids = (None if x is None else (x[0][:, rows], x[1][:, columns]) for x in tokens)
    return Seen(where, ids)


def tile(x: Array, rows: slice, columns: slice) -> Array:
    """Part of an array that broadcasts to [batch, heads, query_length, key_length]."""
    x = x[:, :, rows] if x.shape[2] > 1 else x
    return x[..., columns] if x.shape[3] > 1 else x
