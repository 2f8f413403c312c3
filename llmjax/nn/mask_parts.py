"""Attention in parts: disjoint sets of keys, each attended to in the layout that suits it, merged by log-sum-exp.

A part is the output `[batch, length, heads, value_dim]` and the log-sum-exp `[batch, length, heads]` over its keys,
made from scores without sinks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.masks import Chunked
from llmjax.nn.scores import Scores, Tokens, present
from pallas_kernels.attention import merge_partials

Part = tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch length heads"]]


def merge(scores: Scores, parts: Sequence[Part]) -> Float[Array, "batch length heads value_dim"]:
    """Attention over the union of the parts' keys, and over the sinks of `scores`, which no part has counted."""
    outs, lses = zip(*parts, strict=True)
    out, lse = merge_partials(jnp.stack(outs), jnp.stack(lses))
    if scores.sinks is None:
        return out
    share = jax.nn.sigmoid(lse - scores.sinks.astype(lse.dtype))
    return (out * share[..., None]).astype(out.dtype)


def whole(scores: Scores) -> Part:
    """All keys that the shared rules show."""
    return scores.run(residual=True)


def row_aligned(scores: Scores) -> bool:
    """Whether every row is one document from its first token on, so that indices are positions."""
    return scores.aligned and scores.queries.segment_ids is None


def only(tokens: Tokens, shown: Bool[Array, "batch length"]) -> Tokens:
    """The tokens with those that are not shown absent."""
    return replace(tokens, segment_ids=jnp.where(shown, present(tokens, tokens.segment_ids), -1))


def inside(scores: Scores, size: int, shown: Bool[Array, "batch source"] | None = None) -> Part:
    """Attention inside chunks of `size` tokens of the documents, to the keys that are shown."""
    if row_aligned(scores):
        keys = scores.keys if shown is None else only(scores.keys, shown)
        return by_segment(replace(scores, keys=keys), min(size, scores.query.shape[1]), whole)
    queries, keys = Chunked(size).parts(scores.queries), Chunked(size).parts(scores.keys)
    keys = keys if shown is None else only(keys, shown)
    reach = (size - 1, 0 if scores.causal else size - 1)
    return replace(scores, queries=queries, keys=keys).run(window=reach, residual=True)


def by_segment(scores: Scores, size: int, run: Callable[[Scores], Part]) -> Part:
    """`run` on every `size` consecutive tokens of the rows, `[batch * length / size, size]`."""
    batch, length = scores.query.shape[:2]

    def join(x: Array) -> Array:
        return x.reshape(batch, -1, *x.shape[2:])[:, :length]

    out, lse = run(mapped(padded(scores, size), lambda x: x.reshape(-1, size, *x.shape[2:])))
    return join(out), join(lse)


def by_residue(scores: Scores, stride: int, run: Callable[[Scores], Part]) -> Part:
    """`run` on the tokens of equal index modulo `stride`, `[batch * stride, length / stride]`."""
    batch, length = scores.query.shape[:2]

    def cut(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(batch, -1, stride, *x.shape[2:]), 1, 2).reshape(batch * stride, -1, *x.shape[2:])

    def join(x: Array) -> Array:
        rows = jnp.swapaxes(x.reshape(batch, stride, *x.shape[1:]), 1, 2)
        return rows.reshape(batch, -1, *x.shape[2:])[:, :length]

    out, lse = run(mapped(padded(scores, stride), cut))
    return join(out), join(lse)


def padded(scores: Scores, multiple: int) -> Scores:
    """The scores with absent tokens appended up to a multiple of that length."""
    extra = -scores.query.shape[1] % multiple
    if not extra:
        return scores

    def pad(x: Array, value: int = 0) -> Array:
        return jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)), constant_values=value)

    def tokens(side: Tokens) -> Tokens:
        return Tokens(pad(side.positions, -1), pad(present(side, side.segment_ids), -1))

    query, key, value = pad(scores.query), pad(scores.key), pad(scores.value)
    queries, keys = tokens(scores.queries), tokens(scores.keys)
    return replace(scores, query=query, key=key, value=value, queries=queries, keys=keys)


def mapped(scores: Scores, function: Callable[[Array], Array]) -> Scores:
    """`function` of every array that has a batch and a length."""
    sides = (scores.query, scores.key, scores.value, scores.queries, scores.keys)
    query, key, value, queries, keys = jax.tree.map(function, sides)
    return replace(scores, query=query, key=key, value=value, queries=queries, keys=keys)


def delayed(scores: Scores) -> Scores:
    """Each key in the place of the next: causality by index then hides the token itself."""

    def shift(x: Array, first: int = 0) -> Array:
        return jnp.pad(x, ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)), constant_values=first)[:, :-1]

    keys = Tokens(shift(scores.keys.positions, -1), shift(present(scores.keys, scores.keys.segment_ids), -1))
    return replace(scores, key=shift(scores.key), value=shift(scores.value), keys=keys)


def by_heads(scores: Scores, groups: Sequence[Sequence[int]], run: Callable[[Scores, int], Part]) -> Part:
    """`run(scores, i)` on the query heads of group i and the key heads that they share; a head is in one group."""
    if len(groups) == 1:
        return run(scores, 0)
    shared = scores.query.shape[2] // scores.key.shape[2]
    parts = []
    for i, heads in enumerate(groups):
        of_kv = [head // shared for head in heads]
        once = sorted(set(of_kv))
        even = of_kv == [head for head in once for _ in range(len(of_kv) // len(once))]
        chosen = np.asarray(once if even else of_kv)
        distance = scores.distance
        if distance is not None:
            distance = replace(distance, table=distance.table[np.asarray(heads)])
        query, key, value = scores.query[:, :, np.asarray(heads)], scores.key[:, :, chosen], scores.value[:, :, chosen]
        parts.append(run(replace(scores, query=query, key=key, value=value, distance=distance), i))
    order = np.argsort([head for heads in groups for head in heads])
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=2)[:, :, order], jnp.concatenate(lses, axis=2)[:, :, order]


class Blocks(NamedTuple):
    """The complete blocks of the documents of every row, in order; `ends` are their last tokens, perhaps absent."""

    key: Float[Array, "batch blocks size kv_heads head_dim"]
    value: Float[Array, "batch blocks size kv_heads value_dim"]
    ends: Tokens


def blocks(scores: Scores, size: int) -> Blocks:
    """Keys and values in blocks of `size` tokens, counted from each document's beginning; `source // size` a row."""
    batch, source = scores.key.shape[:2]
    count, keys, key, value = source // size, scores.keys, scores.key, scores.value
    if row_aligned(scores):
        key, value = (x[:, : count * size].reshape(batch, count, size, *x.shape[2:]) for x in (key, value))
        ends = jax.tree.map(lambda x: x[:, size - 1 : count * size : size], keys)
        return Blocks(key, value, ends)
    if not scores.aligned:
        order = jnp.argsort(jnp.where(keys.positions < 0, jnp.iinfo(jnp.int32).max, keys.positions), axis=1)
        keys = jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), keys)
        key, value = pick(key, order), pick(value, order)
    last = (present(keys, keys.segment_ids) >= 0) & ((keys.positions + 1) % size == 0)
    at, ends = some(keys, last, count)
    rows = jnp.maximum(at[..., None] - size + 1 + jnp.arange(size), 0).reshape(batch, -1)
    key, value = (pick(x, rows).reshape(batch, count, size, *x.shape[2:]) for x in (key, value))
    return Blocks(key, value, ends)


def some(tokens: Tokens, chosen: Bool[Array, "batch length"], count: int) -> tuple[Int[Array, "batch count"], Tokens]:
    """Indices of the tokens chosen, in order, and these tokens; absent ones fill the rows up to `count`."""
    at = jnp.argsort(~chosen, axis=1, stable=True)[:, :count]
    tokens = only(tokens, chosen)
    return at, jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=1), tokens)


def pick(x: Float[Array, "batch length heads dim"], rows: Int[Array, "batch count"]) -> Float[Array, "..."]:
    """x[b, rows[b]]."""
    return jnp.take_along_axis(x, rows[..., None, None], axis=1)
