"""The definition of decode attention: the cache gathered into one array, all scores at once."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.reference import definition
from pallas_kernels.decode_attention.cache import Cache, Config, Rule, fetch, key_range, seen_by


def refusal(query: Array, cache: Cache, config: Config) -> str | None:
    """Only block sizes: it has none."""
    return None if config == Config() else "has no block sizes to configure"


def partials(
    query: Float[Array, "batch queries heads head_dim"], cache: Cache, rule: Rule, config: Config
) -> tuple[Float[Array, "1 batch queries heads value_dim"], Float[Array, "1 batch queries heads"]]:
    """Attention over all keys as one part, in float32 (float64 where the arrays are)."""
    batch, queries = query.shape[:2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(cache.capacity, dtype=jnp.int32), (batch, cache.capacity))
    first, stop = key_range(cache.lengths, cache.capacity, rule, queries)
    present = (positions >= first[:, None]) & (positions < stop[:, None])
    key, value = (fetch(x.astype(wide), cache.page_table, positions, present) for x in cache[:2])
    mask = seen_by(cache, rule, queries, positions)[:, None]
    out, lse = definition(query.astype(wide), key, value, None, mask, None, rule.scale, rule.soft_cap)
    return out[None], jnp.swapaxes(lse, 1, 2)[None]
