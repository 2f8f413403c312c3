"""The definition of attention: all scores at once, softmax in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def dense_attention(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    scale: float,
    soft_cap: float | None,
    some_empty: bool = True,
) -> Float[Array, "batch query_length heads value_dim"]:
    """softmax(cap(q k^T scale) + bias) v; `bias` and `mask` broadcast to [batch, heads, query_length, key_length].

    Scores and softmax are float32. A query that may see no key gives zeros; a caller who knows that there is none says
    so with `some_empty`. Vaswani et al. 2017 (1706.03762).
    """
    batch, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    grouped = query.reshape(batch, length, key.shape[2], groups, head_dim)
    scores = jnp.einsum("blkgd,bskd->bkgls", grouped, key, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + by_group(bias.astype(jnp.float32), groups)
    if mask is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        weights = masked_softmax(scores, by_group(mask, groups), some_empty)
    out = jnp.einsum("bkgls,bskd->blkgd", weights.astype(value.dtype), value)
    return out.reshape(batch, length, heads, value.shape[-1])


def by_group(x: Array, groups: int) -> Array:
    """[batch|1, heads|1, q, s] -> [batch|1, kv_heads|1, groups|1, q, s]."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    heads = x.shape[1]
    split = (heads // groups, groups) if heads > 1 else (1, 1)
    return x.reshape(x.shape[0], *split, *x.shape[2:])


def masked_softmax(
    scores: Float[Array, "... keys"], mask: Bool[Array, "... keys"], some_empty: bool
) -> Float[Array, "... keys"]:
    """Softmax over the keys where `mask` is true; all zeros where it is nowhere true."""
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, 0.0) if some_empty else weights
