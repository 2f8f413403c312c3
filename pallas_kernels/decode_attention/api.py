"""The decode attention function: argument checks, and the merge of an implementation's parts and of sinks."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.merge import merge_partials
from pallas_kernels.decode_attention.cache import Cache, Config, Rule
from pallas_kernels.decode_attention.registry import choose

MAX_QUERIES = 16
"""Queries per sequence; more are prefill, which is `attention`'s work."""


def decode_attention(
    query: Float[Array, "batch queries heads head_dim"] | Float[Array, "batch heads head_dim"],
    key_pages: Float[Array, "pages page_size kv_heads head_dim"],
    value_pages: Float[Array, "pages page_size kv_heads value_dim"],
    page_table: Int[Array, "batch max_pages"],
    lengths: Int[Array, " batch"],
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: int | None = None,
    sinks: Float[Array, " heads"] | None = None,
    return_residual: bool = False,
    implementation: str | tuple[str, ...] | None = None,
    config: Config | None = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Float[Array, "..."]]:
    """softmax(cap(q k^T scale)) v of the last few tokens of each sequence against its cache.

    Token p of sequence b is `key_pages[page_table[b, p // page_size], p % page_size]`; `lengths` count the tokens in
    the cache, the queries included: query t is at position lengths - queries + t and sees the keys up to its own, and
    of these the `local_window_size` before it and its own. Entries of the table and contents of pages beyond a length
    are never looked at; a query without keys (length 0) gives 0 and lse -inf. A contiguous cache [batch, length, ...]
    is one page each: `page_table = arange(batch)[:, None]`. Query heads share kv heads in groups (Ainslie et al. 2023,
    2305.13245). `sinks`: a score per head without a value. Keys are split into parts that are merged by their
    log-sum-exp (Dao et al. 2023, flash-decoding; pages: Kwon et al. 2023, 2309.06180). Scores, softmax and sums are
    float32. Each byte of the keys and values that are seen is read once (on Hopper once for every 64 rows of queries x
    heads / kv_heads); no gradient.

    Returns the output in the dtype of the values, with `return_residual` also the float32 lse [batch, queries, heads].
    `implementation`: "reference", "xla", "tpu", "hopper" or some of them in order; None takes the first that fits the
    platform. Raises ValueError where arguments disagree, NotImplementedError with the reason where no named
    implementation can do it.
    """
    single = query.ndim == 3
    query = query[:, None] if single else query
    cache = Cache(key_pages, value_pages, page_table, lengths)
    config = config or Config()
    check_arrays(query, cache, sinks)
    check_numbers(logits_soft_cap, local_window_size, config)
    cache = cache._replace(page_table=page_table.astype(jnp.int32), lengths=lengths.astype(jnp.int32))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    backend = choose(implementation, query, cache, config)
    outs, lses = backend.partials(query, cache, Rule(scale, local_window_size, logits_soft_cap), config)
    if sinks is not None:
        outs = jnp.concatenate([outs, jnp.zeros_like(outs[:1])])
        lses = jnp.concatenate([lses, jnp.broadcast_to(sinks.astype(lses.dtype), lses[:1].shape)])
    out, lse = (outs[0], lses[0]) if len(outs) == 1 else merge_partials(outs, lses)
    out = out.astype(value_pages.dtype)
    out, lse = (out[:, 0], lse[:, 0]) if single else (out, lse)
    return (out, lse) if return_residual else out


def check_arrays(query: Array, cache: Cache, sinks: Array | None) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the arrays fit together."""
    key, value, table, lengths = cache
    if query.ndim != 4:
        raise ValueError(f"query has shape {query.shape}; expected [batch, heads, head_dim] or [batch, queries, ...]")
    if not 1 <= query.shape[1] <= MAX_QUERIES:
        raise ValueError(f"query has shape {query.shape}: 1 to {MAX_QUERIES} queries a sequence; more: `attention`")
    for name, x in (("key_pages", key), ("value_pages", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; expected [pages, page_size, kv_heads, head_dim]")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key_pages has shape {key.shape}, value_pages {value.shape}: all but the last must agree")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query has shape {query.shape}, key_pages {key.shape}: head_dim must agree")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"query has shape {query.shape}, key_pages {key.shape}: kv heads must divide heads")
    if not query.dtype == key.dtype == value.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"query, key_pages, value_pages are {query.dtype}, {key.dtype}, {value.dtype}: not one float")
    if sinks is not None and sinks.shape != query.shape[2:3]:
        raise ValueError(f"sinks has shape {sinks.shape}, query {query.shape}: expected [heads]")
    check_table(query, table, lengths)


def check_table(query: Array, table: Array, lengths: Array) -> None:
    """Raise ValueError unless there is a row of the table and a length for each sequence."""
    if table.ndim != 2 or table.shape[0] != query.shape[0] or not table.shape[1]:
        raise ValueError(f"page_table has shape {table.shape}, query {query.shape}: expected [batch, max_pages]")
    if lengths.shape != query.shape[:1]:
        raise ValueError(f"lengths has shape {lengths.shape}, query {query.shape}: expected [batch]")
    for name, x in (("page_table", table), ("lengths", lengths)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} of shape {x.shape} has dtype {x.dtype}: expected integers")


def check_numbers(soft_cap: float | None, window: int | None, config: Config) -> None:
    """Raise ValueError for a number that means nothing."""
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"logits_soft_cap={soft_cap} must be positive")
    if window is not None and window < 0:
        raise ValueError(f"local_window_size={window} must not be negative: the keys before the query's own")
    for name in ("block_k", "splits", "stages"):
        number = getattr(config, name)
        if number is not None and number < 1:
            raise ValueError(f"config.{name}={number} must be positive")
