"""The attention function: argument checks, the mask's description, and the choice of an implementation."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.mask import Ends, Rule, allowed
from pallas_kernels.attention.reference import dense_attention
from pallas_kernels.attention.xla import blockwise_attention

IMPLEMENTATIONS = ("reference", "xla")


def attention(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    segment_ids: Int[Array, "batch length"] | tuple[Int[Array, "..."], Int[Array, "..."]] | None = None,
    positions: tuple[Int[Array, "batch query_length"], Int[Array, "batch key_length"]] | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query_length heads value_dim"]:
    """softmax(cap(q k^T scale) + bias) v over the keys that a query may see; layout and names of `jax.nn`'s function.

    A key is seen where `mask` (broadcast to [batch, heads, query_length, key_length]) allows it, where `is_causal` and
    `local_window_size` (left, right) allow its position, and where its segment is the query's. `positions` are those of
    queries and keys, by default their indices; a negative one marks an absent token. Key and value heads are shared by
    groups of query heads (Ainslie et al. 2023, 2305.13245). Softmax is float32; the result has the dtype of `value`; a
    query that sees no key gives zeros. `implementation`: "reference", "xla", or None for the best that fits.
    Raises ValueError where shapes disagree or the name is unknown, NotImplementedError where an implementation cannot.
    """
    check_shapes(query, key, value)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    rule = Rule(is_causal, local_window_size)
    ends = describe(query, key, segment_ids, positions)
    plain = bias is None and mask is None
    chosen = implementation or ("xla" if plain else "reference")
    if chosen == "xla":
        if not plain:
            raise NotImplementedError('attention "xla" takes no bias or dense mask: use "reference"')
        indexed = positions is None
        return blockwise_attention(query, key, value, rule, ends, scale, logits_soft_cap, indexed)
    if chosen == "reference":
        seen = allowed(rule, *ends)[:, None]
        seen = seen if mask is None else seen & mask
        return dense_attention(query, key, value, bias, seen, scale, logits_soft_cap)
    raise ValueError(f"implementation={implementation!r} is unknown: use one of {', '.join(IMPLEMENTATIONS)}")


def describe(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    segment_ids: Int[Array, "..."] | tuple[Int[Array, "..."], Int[Array, "..."]] | None,
    positions: tuple[Int[Array, "..."], Int[Array, "..."]] | None,
) -> tuple[Ends, Ends]:
    """Positions and segments of both sides, with their defaults; raises ValueError where a length disagrees."""
    segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if positions is None:
        positions = (jnp.arange(query.shape[1])[None], jnp.arange(key.shape[1])[None])
    sides = []
    for name, x, where, segment in zip(("query", "key"), (query, key), positions, segments, strict=True):
        for what, ids in (("positions", where), ("segment_ids", segment)):
            if ids is not None and ids.shape[1] != x.shape[1]:
                raise ValueError(f"{what} of the {name} side have shape {ids.shape}, {name} has {x.shape}")
        sides.append(Ends(where, segment))
    return sides[0], sides[1]


def check_shapes(query: Array, key: Array, value: Array) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the three arrays fit together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; expected [batch, length, heads, head_dim]")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key has shape {key.shape}, value {value.shape}: batch, length and heads must agree")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query has shape {query.shape}, key {key.shape}: batch and head_dim must agree")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"query has shape {query.shape}, key {key.shape}: kv heads must divide heads")
