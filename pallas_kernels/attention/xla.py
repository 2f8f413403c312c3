"""Attention in plain XLA: dense for short lengths, in query blocks that are recomputed backward for long ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Ends, Rule, allowed
from pallas_kernels.attention.reference import dense_attention

BLOCK = 512


def blockwise_attention(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    rule: Rule,
    query_ends: Ends,
    key_ends: Ends,
    scale: float,
    soft_cap: float | None,
    block: int = BLOCK,
) -> Float[Array, "batch query_length heads value_dim"]:
    """Attention over blocks of `block` queries, each against all keys; scores of one block exist at a time.

    Temporary memory is batch * heads * block * key_length floats, forward and backward. Rabe and Staats 2021
    (2112.05682).
    """

    @jax.checkpoint
    def one(args: tuple[Array, Ends]) -> Float[Array, "batch block heads value_dim"]:
        q, ends = args
        mask = allowed(rule, ends, key_ends)[:, None]
        return dense_attention(q, key, value, None, mask, scale, soft_cap)

    length = query.shape[1]
    if length <= block:
        mask = allowed(rule, query_ends, key_ends)[:, None]
        return dense_attention(query, key, value, None, mask, scale, soft_cap)
    count = -(-length // block)
    pad = count * block - length

    def split(x: Array, fill: int) -> Array:
        widths = [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    segments = None if query_ends.segments is None else split(query_ends.segments, 0)
    ends = Ends(split(query_ends.positions, -1), segments)
    out = jax.lax.map(one, (split(query, 0), ends))
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], count * block, *out.shape[3:])
    return out[:, :length]
