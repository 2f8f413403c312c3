"""Sums of log decays over spans of tokens, and products of queries and keys that decay over the span between them.

Every exponent here is a sum of decays, never a difference of two sums: nothing overflows however strong the decay, a
decay of -inf forgets everything, and a weak decay after a strong one keeps its digits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW = 8
"""Up to so many rows are summed one by one: XLA's running sums for TPU go over windows, at any number of rows."""


def up_to(decay: Float[Array, "... length dim"], exclusive: bool) -> Float[Array, "... length dim"]:
    """sum of decay_l over l <= i, or over l < i."""
    if exclusive:
        decay = jnp.concatenate([jnp.zeros_like(decay[..., :1, :]), decay[..., :-1, :]], axis=-2)
    return running(decay, reverse=False)


def after(decay: Float[Array, "... length dim"]) -> Float[Array, "... length dim"]:
    """sum of decay_l over l > j."""
    decay = jnp.concatenate([decay[..., 1:, :], jnp.zeros_like(decay[..., :1, :])], axis=-2)
    return running(decay, reverse=True)


def running(x: Float[Array, "... length dim"], reverse: bool) -> Float[Array, "... length dim"]:
    """The sums of all rows up to each, or from each on."""
    length = x.shape[-2]
    if length > FEW:
        return jax.lax.cumsum(x, axis=x.ndim - 2, reverse=reverse)
    index = jnp.arange(length)
    seen = index[:, None] <= index if reverse else index[:, None] >= index
    return jnp.sum(jnp.where(seen[..., None], x[..., None, :, :], 0), axis=-2)


def between(decay: Float[Array, "... length"], exclusive: bool) -> Float[Array, "... length length"]:
    """[i, j]: sum of decay_l over j < l <= i, or over j < l < i; 0 where there is no such l."""
    index = jnp.arange(decay.shape[-1])
    late = jnp.where(index[:, None] > index, decay[..., None], 0)
    return up_to(late, exclusive)


def decayed_products(
    query: Float[Array, "... length key_dim"],
    key: Float[Array, "... length key_dim"],
    decay: Float[Array, "... length key_dim"],
    exclusive: bool,
) -> Float[Array, "... length length"]:
    """[i, j]: sum over k of q_ik k_jk exp(sum of decay_lk over j < l <= i, or j < l < i); 0 where i < j.

    By doubling (the length is a power of two): two blocks that lie side by side are joined by one product, in which the
    queries of the second have decayed since its beginning and the keys of the first up to its end.
    """
    rows = decay.shape[:-1]
    products = jnp.broadcast_to(jnp.sum(query * key, axis=-1), rows)[..., None]
    since, until = (jnp.zeros_like(decay) if exclusive else decay), jnp.zeros_like(decay)
    for size in (1 << level for level in range((rows[-1] - 1).bit_length())):
        first, second = halves(products, size)
        past, near = halves(since, size)
        far, rest = halves(until, size)
        before, behind = (block[..., :1, :] for block in halves(decay + until, size))
        late, early = halves(query, size)[1] * jnp.exp(near), halves(key, size)[0] * jnp.exp(far)
        cross = late @ jnp.swapaxes(early, -1, -2)
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        products = side_by_side(above, jnp.concatenate([cross, second], axis=-1))
        since, until = side_by_side(past, near + before), side_by_side(far + behind, rest)
    return products


def halves(x: Float[Array, "... length dim"], size: int) -> tuple[Array, Array]:
    """The even and the odd blocks of `size` rows, each [..., blocks, size, dim]."""
    x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def side_by_side(even: Float[Array, "... blocks size dim"], odd: Float[Array, "... blocks size dim"]) -> Array:
    """The rows of even and odd blocks in their order, [..., length, dim]."""
    x = jnp.stack([even, odd], axis=-3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])
