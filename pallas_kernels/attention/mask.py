"""Which keys a query may attend to: a small static rule and a few arrays, never a [length, length] array by itself."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

ABSENT_QUERY, ABSENT_KEY = -1, -2
"""Segment ids of tokens that are not there: unequal to each other and to every document."""
STATIC: dict[str, Any] = {"static": True}


@dataclass(frozen=True)
class Rule:
    """The static part of the scores: cap(scale q.k) where query position - key position lies in the window."""

    scale: float
    causal: bool
    window: tuple[int | None, int | None] | None
    """(left, right): -right <= query position - key position <= left; None is unbounded"""
    soft_cap: float | None


class Seen(NamedTuple):
    """The dynamic part: positions and documents of queries and keys, `[batch | 1, length]`, int32.

    `positions` None: the indices 0, 1, ... on both sides. `segments` None: one document. A query sees a key of equal id
    only; absent tokens carry `ABSENT_QUERY` or `ABSENT_KEY`.
    """

    positions: tuple[Int[Array, "batch query_length"], Int[Array, "batch key_length"]] | None
    segments: tuple[Int[Array, "batch query_length"], Int[Array, "batch key_length"]] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """A description of a mask: a query sees a key where every part that is given allows it. `a & b` joins two.

    Arrays are int32 of `[batch, length]` (one for both sides, or a pair of queries' and keys'), lengths `[batch]`.
    A negative position or segment id, and an index from the length on, mark a token that is not there.
    """

    is_causal: bool = field(default=False, metadata=STATIC)
    local_window_size: tuple[int | None, int | None] | None = field(default=None, metadata=STATIC)
    segment_ids: tuple[Array, Array] | Array | None = None
    positions: tuple[Array, Array] | Array | None = None
    query_seq_lengths: Int[Array, " batch"] | None = None
    key_value_seq_lengths: Int[Array, " batch"] | None = None
    dense: Bool[Array, "..."] | None = None
    """broadcast to [batch, heads, query_length, key_length]"""

    def __and__(self, other: "Mask") -> "Mask":
        """What both allow; raises ValueError where both give the same arrays (other than `dense`)."""
        joined: dict[str, Any] = {"is_causal": self.is_causal or other.is_causal}
        for name in (f.name for f in dataclasses.fields(self) if f.name != "is_causal"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None or theirs is None:
                joined[name] = theirs if mine is None else mine
            elif name == "local_window_size":
                joined[name] = tuple(min(filter(lambda x: x is not None, s), default=None) for s in zip(mine, theirs))
            elif name == "dense":
                joined[name] = mine & theirs
            else:
                raise ValueError(f"{name} is given twice: as an argument and in the mask, or in both masks")
        return Mask(**joined)


def pair(x: tuple[Array, Array] | Array | None) -> tuple[Array | None, Array | None]:
    """The queries' and the keys' arrays of an argument that gives one or both."""
    return (x[0], x[1]) if isinstance(x, tuple) else (x, x)


def seen(mask: Mask, lengths: tuple[int, int]) -> Seen:
    """The mask's arrays as kernels take them: absences moved into the segments. `lengths` of queries and keys."""
    positions, segments = pair(mask.positions), pair(mask.segment_ids)
    counts = (mask.query_seq_lengths, mask.key_value_seq_lengths)
    if all(x is None for x in (*positions, *segments, *counts)):
        return Seen(None, None)
    sides = []
    for where, ids, count, length, absent in zip(positions, segments, counts, lengths, (ABSENT_QUERY, ABSENT_KEY)):
        present = jnp.ones((1, length), bool) if count is None else jnp.arange(length)[None] < count[:, None]
        present = present if where is None else present & (where >= 0)
        present = present if ids is None else present & (ids >= 0)
        ids = jnp.zeros((1, length), jnp.int32) if ids is None else ids
        sides.append(jnp.where(present, ids, absent).astype(jnp.int32))
    rows, columns = positions
    both = None if rows is None or columns is None else (rows.astype(jnp.int32), columns.astype(jnp.int32))
    return Seen(both, (sides[0], sides[1]))


def ends(tokens: Seen, lengths: tuple[int, int]) -> Seen:
    """The same with positions written out."""
    indices = tuple(jnp.arange(n, dtype=jnp.int32)[None] for n in lengths)
    return Seen(tokens.positions or (indices[0], indices[1]), tokens.segments)


def allowed(rule: Rule, tokens: Seen) -> Bool[Array, "batch query_length key_length"]:
    """True where the query may see the key; `tokens` has its positions written out."""
    assert tokens.positions is not None
    query, key = tokens.positions
    distance = query[:, :, None] - key[:, None, :]
    left, right = rule.window or (None, None)
    visible = jnp.ones(distance.shape, bool)
    if rule.causal:
        visible &= distance >= 0
    if left is not None:
        visible &= distance <= left
    if right is not None:
        visible &= distance >= -right
    if tokens.segments is not None:
        visible = visible & (tokens.segments[0][:, :, None] == tokens.segments[1][:, None, :])
    return visible


class Extent(NamedTuple):
    """Of every block of tokens: least and greatest position and segment of those present, whether any and all are."""

    first: Int[Array, "batch blocks"]
    last: Int[Array, "batch blocks"]
    low: Int[Array, "batch blocks"]
    high: Int[Array, "batch blocks"]
    some: Bool[Array, "batch blocks"]
    every: Bool[Array, "batch blocks"]


def extent(positions: Int[Array, "batch length"], segments: Int[Array, "batch length"] | None, block: int) -> Extent:
    """The extents of blocks of `block` tokens; the last one may be short, and is then not entirely present."""
    segments = jnp.zeros((1, positions.shape[1]), jnp.int32) if segments is None else segments
    positions, segments = jnp.broadcast_arrays(positions, segments)
    pad = -positions.shape[1] % block
    ids = jnp.pad(segments, ((0, 0), (0, pad)), constant_values=-1).reshape(segments.shape[0], -1, block)
    where = jnp.pad(positions, ((0, 0), (0, pad))).reshape(ids.shape)
    there = ids >= 0
    least, most = np.iinfo(np.int32).min // 2, np.iinfo(np.int32).max // 2
    low, high = (lambda x: jnp.where(there, x, most).min(-1)), (lambda x: jnp.where(there, x, least).max(-1))
    return Extent(low(where), high(where), low(ids), high(ids), there.any(-1), there.all(-1))


def block_map(
    tokens: Seen, rule: Rule, query_length: int, key_length: int, block_q: int, block_k: int
) -> Int[Array, "batch query_blocks key_blocks"]:
    """How much of each block of scores is seen: 0 nothing, 1 perhaps some, 2 everything. Made on the device.

    From the extents of the blocks' positions and segments, so that 1 may stand where nothing is seen, but 0 and 2 are
    certain. Blocks that reach beyond a length are never 2.
    """
    tokens = ends(tokens, (query_length, key_length))
    assert tokens.positions is not None
    segments = tokens.segments or (None, None)
    q = Extent(*(x[:, :, None] for x in extent(tokens.positions[0], segments[0], block_q)))
    k = Extent(*(x[:, None, :] for x in extent(tokens.positions[1], segments[1], block_k)))
    nearest, farthest = q.first - k.last, q.last - k.first
    left, right = rule.window or (None, None)
    floors = ([0] if rule.causal else []) + ([] if right is None else [-right])
    least = max(floors, default=None)
    possible, certain = q.some & k.some, q.every & k.every
    if least is not None:
        possible, certain = possible & (farthest >= least), certain & (nearest >= least)
    if left is not None:
        possible, certain = possible & (nearest <= left), certain & (farthest <= left)
    possible &= (q.low <= k.high) & (k.low <= q.high)
    certain &= (q.low == q.high) & (k.low == k.high) & (q.low == k.low)
    return possible.astype(jnp.int32) + (possible & certain).astype(jnp.int32)


def first_last(blocks: Int[Array, "batch rows columns"]) -> tuple[Int[Array, "batch rows"], Int[Array, "batch rows"]]:
    """For each row of a block map: its first column that is not 0, and one past the last; (0, 0) where all are 0."""
    some = blocks > 0
    count = blocks.shape[-1]
    first, last = jnp.argmax(some, axis=-1), count - jnp.argmax(some[..., ::-1], axis=-1)
    empty = ~some.any(-1)
    return jnp.where(empty, 0, first).astype(jnp.int32), jnp.where(empty, 0, last).astype(jnp.int32)
