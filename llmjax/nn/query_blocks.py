"""Attention whose scores a kernel cannot make, a block of queries at a time: memory grows with the length only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def by_queries(function: Callable[[Any], Any], queries: Any, size: int) -> Any:
    """`function` of `size` queries at a time, the results joined; what a block computes is computed again backward.

    `queries` and the result are trees of arrays `[batch, length, ...]`. The last block is filled up, whole numbers with
    -1 (absent).
    """
    batch, length = jax.tree.leaves(queries)[0].shape[:2]
    if length <= size:
        return function(queries)

    def cut(x: Shaped[Array, "batch length ..."]) -> Shaped[Array, "blocks batch size ..."]:
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        x = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return jnp.swapaxes(x.reshape(batch, -1, size, *x.shape[2:]), 0, 1)

    def join(x: Shaped[Array, "blocks batch size ..."]) -> Shaped[Array, "batch length ..."]:
        return jnp.swapaxes(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(function), jax.tree.map(cut, queries)))
