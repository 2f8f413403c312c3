"""Decode attention in plain XLA: blocks of keys are gathered from their pages and joined by an online softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.decode_attention.cache import Cache, Config, Rule, fetch, key_range, seen_by

BLOCK = 512
"""Keys of each sequence that are gathered at a time."""


def refusal(query: Array, cache: Cache, config: Config) -> str | None:
    """Only numbers of another implementation: it takes every dtype and shape."""
    return None if (config.splits, config.stages) == (None, None) else "has no splits or stages to configure"


def partials(
    query: Float[Array, "batch queries heads head_dim"], cache: Cache, rule: Rule, config: Config
) -> tuple[Float[Array, "1 batch queries heads value_dim"], Float[Array, "1 batch queries heads"]]:
    """Attention over all keys as one part; temporary memory is that of `config.block_k` tokens of every sequence.

    Each sequence begins at its own first key, so the number of steps is that of the longest range of keys that a
    sequence sees: what lies beyond the longest length or before every window is not read. Products are in the dtype of
    the cache with float32 sums. Milakov and Gimelshein 2018 (1805.02867).
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads, value_dim = cache.value_pages.shape[2:]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    block = min(config.block_k or BLOCK, cache.capacity)
    first, stop = key_range(cache.lengths, cache.capacity, rule, queries)
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    State = tuple[Array, Array, Array]

    def step(i: Array, state: State) -> State:
        top, total, acc = state
        positions = first[:, None] + i * block + jnp.arange(block, dtype=jnp.int32)
        present = positions < stop[:, None]
        key, value = (fetch(x, cache.page_table, positions, present) for x in cache[:2])
        scores = jnp.einsum("btkgd,bskd->btkgs", grouped, key, preferred_element_type=wide) * rule.scale
        if rule.soft_cap is not None:
            scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
        seen = seen_by(cache, rule, queries, positions)
        scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
        new = jnp.maximum(top, jnp.max(scores, axis=-1))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        decay, weights = jnp.exp(top - base), jnp.exp(scores - base[..., None])
        part = jnp.einsum("btkgs,bskd->btkgd", weights.astype(value.dtype), value, preferred_element_type=wide)
        return new, total * decay + jnp.sum(weights, axis=-1), acc * decay[..., None] + part

    rows = grouped.shape[:-1]
    start = (jnp.full(rows, -jnp.inf, wide), jnp.zeros(rows, wide), jnp.zeros((*rows, value_dim), wide))
    steps = (jnp.max(stop - first, initial=0) + block - 1) // block
    top, total, acc = jax.lax.fori_loop(0, steps, step, start)
    out = acc / jnp.where(total == 0, 1.0, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    return out.reshape(1, batch, queries, heads, value_dim), lse.reshape(1, batch, queries, heads)
