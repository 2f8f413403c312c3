"""Attention in plain XLA, a block of queries at a time: keys that no query of the block may see are not computed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Ends, Rule, allowed
from pallas_kernels.attention.reference import dense_attention

SHORT = 1024
"""Up to this many queries the blocks are laid out and keep their weights for the backward pass."""
BLOCKS = 4
"""Blocks of a short sequence: more skip more of the upper triangle, and make more and smaller products."""
LONG_BLOCK = 512
"""Queries in a block of a long sequence, whose weights are recomputed backward."""


def blockwise_attention(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    rule: Rule,
    ends: tuple[Ends, Ends],
    scale: float,
    soft_cap: float | None,
    indexed: bool,
) -> Float[Array, "batch query_length heads value_dim"]:
    """Attention by blocks of queries. `indexed`: positions are the indices of the tokens on both sides.

    Temporary memory of long sequences is batch * heads * 512 * key_length floats, forward and backward. Rabe and Staats
    2021 (2112.05682).
    """
    if query.shape[1] > SHORT:
        return long_attention(query, key, value, rule, ends, scale, soft_cap)
    square = indexed and query.shape[1] == key.shape[1]
    size = -(-query.shape[1] // BLOCKS) if square and (rule.causal or rule.window) else query.shape[1]
    outputs = []
    for start in range(0, query.shape[1], size):
        rows = slice(start, start + size)
        columns = reachable(rule, start, start + size) if square else slice(None)
        mask = allowed(rule, cut(ends[0], rows), cut(ends[1], columns))[:, None]
        part = (query[:, rows], key[:, columns], value[:, columns])
        outputs.append(dense_attention(*part, None, mask, scale, soft_cap, some_empty=not square))
    return jnp.concatenate(outputs, axis=1)


def reachable(rule: Rule, start: int, stop: int) -> slice:
    """The keys that queries start to stop - 1 may see, positions being indices."""
    left, right = rule.window or (None, None)
    first = 0 if left is None else max(start - left, 0)
    if rule.causal:
        return slice(first, stop)
    return slice(first, None if right is None else stop + right)


def cut(ends: Ends, part: slice) -> Ends:
    """One side's positions and segments of some tokens."""
    return Ends(ends.positions[:, part], None if ends.segments is None else ends.segments[:, part])


def long_attention(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    rule: Rule,
    ends: tuple[Ends, Ends],
    scale: float,
    soft_cap: float | None,
    block: int = LONG_BLOCK,
) -> Float[Array, "batch query_length heads value_dim"]:
    """A loop over blocks of queries, each against all keys; the weights of one block exist at a time."""

    @jax.checkpoint
    def one(args: tuple[Array, Ends]) -> Float[Array, "batch block heads value_dim"]:
        q, rows = args
        return dense_attention(q, key, value, None, allowed(rule, rows, ends[1])[:, None], scale, soft_cap)

    length = query.shape[1]
    count = -(-length // block)

    def split(x: Array, fill: int) -> Array:
        widths = [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    segments = None if ends[0].segments is None else split(ends[0].segments, 0)
    out = jax.lax.map(one, (split(query, 0), Ends(split(ends[0].positions, -1), segments)))
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], count * block, *out.shape[3:])
    return out[:, :length]
