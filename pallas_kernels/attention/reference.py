"""The definition of attention: all scores at once, softmax in float32 or float64."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def dense_attention(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    sinks: Float[Array, " heads"] | None,
    scale: float,
    soft_cap: float | None,
    some_empty: bool = True,
) -> tuple[Float[Array, "batch query_length heads value_dim"], Float[Array, "batch heads query_length"]]:
    """softmax(cap(q k^T scale) + bias) v and the log-sum-exp of the scores, in products of the arrays' own precision.

    `bias` and `mask` broadcast to [batch, heads, query_length, key_length]. Scores and softmax are float32 (float64
    where the query is). A sink is one more score without a value (Xiao et al. 2023, 2309.17453; learned: gpt-oss,
    2508.10925). A query that may see no key gives zeros and -inf; a caller who knows that there is none says so with
    `some_empty`. Vaswani et al. 2017 (1706.03762).
    """
    batch, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, length, key.shape[2], groups, head_dim)
    scores = jnp.einsum("blkgd,bskd->bkgls", grouped, key, preferred_element_type=wide) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + by_group(bias.astype(wide), groups)
    some = None
    if mask is not None:
        mask = by_group(mask, groups)
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
        some = jnp.any(mask, axis=-1, keepdims=True) if some_empty else None
    weights = jax.nn.softmax(scores, axis=-1)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    if some is not None:
        weights, lse = jnp.where(some, weights, 0.0), jnp.where(some, lse, -jnp.inf)
    if sinks is not None:
        sink = sinks.astype(wide).reshape(-1, groups, 1, 1)
        weights = weights * jax.nn.sigmoid(lse - sink)
        lse = jnp.logaddexp(lse, sink)
    out = jnp.einsum("bkgls,bskd->blkgd", weights.astype(value.dtype), value)
    return out.reshape(batch, length, heads, value.shape[-1]), lse.reshape(batch, heads, length)


def definition(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    sinks: Float[Array, " heads"] | None,
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Array, "batch query_length heads value_dim"], Float[Array, "batch heads query_length"]]:
    """`dense_attention` with every product in float32 (float64 where the arrays are); the output has value's dtype."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    q, k, v = (x.astype(wide) for x in (query, key, value))
    with jax.default_matmul_precision("highest"):
        out, lse = dense_attention(q, k, v, bias, mask, sinks, scale, soft_cap)
    return out.astype(value.dtype), lse


def by_group(x: Array, groups: int) -> Array:
    """[batch|1, heads|1, q, s] -> [batch|1, kv_heads|1, groups|1, q, s]."""
    heads = x.shape[1]
    split = (heads // groups, groups) if heads > 1 else (1, 1)
    return x.reshape(x.shape[0], *split, *x.shape[2:])
