"""What the TPU's two attention kernels share: which blocks of scores a grid visits, and what a tile of them sees.

Both grids run over blocks of queries and, innermost, the blocks of keys that those queries see. Where positions are
indices and there are no segments these are a contiguous range, computed from the grid's own indices; otherwise they
come from a table made on the device from the mask's block map, and the grid is as long as its longest row.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.mask import ABSENT_KEY, ABSENT_QUERY, Rule, Seen, block_map

LANES = 128
LOG2E = math.log2(math.e)
MASKED = -0.7 * float(np.finfo(np.float32).max)
"""Stands for minus infinity among scores: differences of two of them are still numbers."""
NOTHING, SOME, EVERYTHING = 0, 1, 2
"""What a step of the grid sees of its block."""
VMEM_BYTES = 40 * 2**20
"""What a kernel may take of a core's vector memory: v5p and tpu7x have 64 MiB, v5e and v6e 128."""


@dataclass(frozen=True)
class Config:
    """Rows of the blocks of scores. A block of keys is worked on `compute` keys at a time."""

    block_q: int = 1024
    block_k: int = 1024
    compute: int = 512
    backward_block_q: int = 1024
    backward_block_k: int = 1024
    backward_compute: int = 512
    resident: int = 8192
    """keys whose gradients are summed in vector memory; more keys than that are worked on in turns"""


# ---- which blocks are visited ----------------------------------------------------------------------------------------


def bounds(rule: Rule) -> tuple[int | None, int | None]:
    """The least and the greatest query position - key position that the rule allows; None is unbounded."""
    left, right = rule.window or (None, None)
    lows = [0] * rule.causal + ([] if right is None else [-right])
    return max(lows, default=None), left


@dataclass(frozen=True)
class Tiling:
    """The static half of a kernel: lengths, blocks, and which blocks of keys a block of queries visits."""

    rule: Rule
    lengths: tuple[int, int]
    block_q: int
    block_k: int
    compute: int
    indexed: bool
    """positions are the indices of the tokens"""
    segmented: bool
    part: tuple[int, int]
    """the first block of keys that belongs to this kernel, and one past the last"""

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.lengths[0] // self.block_q)

    @property
    def columns(self) -> int:
        """Blocks of keys of this kernel."""
        return self.part[1] - self.part[0]

    @property
    def static(self) -> bool:
        """Whether the grid's indices tell which blocks are seen."""
        return self.indexed and not self.segmented

    @property
    def unmasked(self) -> bool:
        """Whether every block is seen entirely."""
        return self.static and bounds(self.rule) == (None, None) and self.lengths[1] % self.block_k == 0

    def end_of(self, row: Any, where: Any = jnp) -> Any:
        """One past the last query of a block."""
        return where.minimum((row + 1) * self.block_q, self.lengths[0])

    def reach(self, row: Any, where: Any = jnp) -> tuple[Any, Any]:
        """First block of keys that a block of queries sees, and one past the last, counted within `part`."""
        low, high = bounds(self.rule)
        start, stop = self.part
        first, last = start * self.block_k, min(stop * self.block_k, self.lengths[1]) - 1
        if high is not None:
            first = where.maximum(row * self.block_q - high, first)
        if low is not None:
            last = where.minimum(self.end_of(row, where) - 1 - low, last)
        empty = last < first
        begin = quotient(where.minimum(first, stop * self.block_k - 1), self.block_k) - start
        end = quotient(where.maximum(last, 0), self.block_k) + 1 - start
        return begin, where.where(empty, begin, end)

    def steps(self) -> int:
        """The most blocks of keys that any block of queries visits, at least 1."""
        if not self.static:
            return self.columns
        begin, end = self.reach(np.arange(self.rows), np)
        return max(int(np.max(end - begin)), 1)

    def locate(self, batch: Any, row: Any, step: Any, table: Any) -> tuple[Any, Any]:
        """The block of keys (within `part`) of a step, and what is seen of it; steps too many repeat a block."""
        if not self.static:
            rows = table.shape[0] // (self.rows * self.columns)
            entry = table[(jnp.where(rows == 1, 0, batch) * self.rows + row) * self.columns + step]
            return entry >> 2, entry & 3
        begin, end = self.reach(row)
        column = jnp.minimum(begin + step, jnp.maximum(end - 1, begin))
        if self.unmasked:
            return column, jnp.int32(EVERYTHING)
        low, high = bounds(self.rule)
        # The block of this step, which is another one than `column` where the steps are too many.
        query, end = row * self.block_q, self.end_of(row)
        key = (self.part[0] + begin + step) * self.block_k
        some = key < min(self.part[1] * self.block_k, self.lengths[1])
        every = key + self.block_k <= self.lengths[1]
        if low is not None:
            some &= end - 1 - key >= low
            every &= query - (key + self.block_k - 1) >= low
        if high is not None:
            some &= query - (jnp.minimum(key + self.block_k, self.lengths[1]) - 1) <= high
            every &= end - 1 - key <= high
        return column, jnp.where(some, jnp.where(every, EVERYTHING, SOME), NOTHING)

    def pairs(self) -> int:
        """Pairs of query and key within `part` that positions allow, for the cost estimate; segments are not known."""
        low, high = bounds(self.rule)
        row = np.arange(self.lengths[0], dtype=np.int64)
        bound = not self.indexed
        start, stop = self.part[0] * self.block_k, min(self.part[1] * self.block_k, self.lengths[1])
        first = start if bound or high is None else np.maximum(row - high, start)
        last = stop - 1 if bound or low is None else np.minimum(row - low, stop - 1)
        return int(np.sum(np.maximum(last - first + 1, 0) + 0 * row))


def quotient(x: Any, y: int) -> Any:
    """x // y of numbers that are not negative, without the instructions for the others."""
    return x // y if isinstance(x, int | np.ndarray | np.integer) else jax.lax.div(x, jnp.int32(y))


def fit(block: int, length: int, multiple: int = LANES) -> int:
    """The block size for a length: at most about `block`, in equal parts, a multiple of `multiple`."""
    parts = -(-length // block)
    part = -(-length // parts)
    return -(-part // multiple) * multiple


def tile(lengths: tuple[int, int], seen: Seen, rule: Rule, block_q: int, block_k: int, compute: int) -> Tiling:
    """The tiling of all keys with these block sizes, made to fit the lengths."""
    compute = min(compute, fit(block_k, lengths[1]))
    block_q, block_k = fit(block_q, lengths[0]), fit(block_k, lengths[1], compute)
    part = (0, -(-lengths[1] // block_k))
    return Tiling(rule, lengths, block_q, block_k, compute, seen.positions is None, seen.segments is not None, part)


def visits(tiling: Tiling, seen: Seen) -> tuple[Int[Array, " entries"] | None, int | Int[Array, ""]]:
    """The table of blocks to visit (4 * block + what is seen; None for a static tiling) and the steps of the grid.

    An entry per step of every block of queries: first the blocks that it sees, in order, and then, and where it sees
    none, the block of the step before, so that nothing is fetched.
    """
    if tiling.static:
        return None, tiling.steps()
    blocks = block_map(seen, tiling.rule, *tiling.lengths, tiling.block_q, tiling.block_k)
    blocks = blocks[:, :, tiling.part[0] : tiling.part[1]]
    order = jnp.argsort(blocks == NOTHING, axis=-1, stable=True).astype(jnp.int32)
    kinds = jnp.take_along_axis(blocks, order, axis=-1).reshape(-1)
    index = jnp.arange(kinds.size, dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(kinds > NOTHING, index, 0))
    table = 4 * order.reshape(-1)[latest] + kinds
    return table.astype(jnp.int32), jnp.maximum(jnp.max(jnp.sum(blocks > NOTHING, axis=-1)), 1).astype(jnp.int32)


# ---- what a tile sees ------------------------------------------------------------------------------------------------


def column(row: Int[Array, "1 length"]) -> Int[Array, "length 1"]:
    """A row of ids as a column."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def visible(
    tiling: Tiling, origin: tuple[Any, Any], shape: tuple[int, ...], keys_first: bool, ids: dict[str, Any], part: Any
) -> Bool[Array, "rows columns"]:
    """Which pairs of a tile are seen. `origin`: index of its first query and key; `keys_first`: keys are the rows.

    `ids` holds refs of the block's positions and segments as rows, `part` the slice of the keys' that the tile is.
    """
    axis = int(keys_first)
    low, high = bounds(tiling.rule)
    oriented = (lambda q, k: (q, column(k))) if keys_first else (lambda q, k: (column(q), k))
    conditions = []
    if low is not None or high is not None:
        if tiling.indexed:
            iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, shape)
            distance, shift = iota(axis) - iota(1 - axis), origin[0] - origin[1]
        else:
            query, key = oriented(ids["query_positions"][...], ids["key_positions"][:, part])
            distance, shift = query - key, 0
        conditions += [] if low is None else [distance >= low - shift]
        conditions += [] if high is None else [distance <= high - shift]
    if tiling.segmented:
        query, key = oriented(ids["query_segments"][...], ids["key_segments"][:, part])
        conditions.append(query == key)
    elif tiling.lengths[1] % tiling.block_k:
        conditions.append(jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis) < tiling.lengths[1] - origin[1])
    return functools.reduce(jnp.logical_and, conditions, jnp.ones(shape, bool)) if conditions else jnp.ones(shape, bool)


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """The product of two blocks over one axis of each, summed in float32; float32 operands are not rounded."""
    exact = jax.lax.Precision.HIGHEST if a.dtype.itemsize > 2 else jax.lax.Precision.DEFAULT
    total = jnp.promote_types(a.dtype, jnp.float32)
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=total)


def base2(products: Array, rule: Rule) -> tuple[Array, Array | None]:
    """Scores in base 2, exp(score) = 2^result, from q.k; and the soft cap's tanh where there is one."""
    if rule.soft_cap is None:
        return products * (rule.scale * LOG2E), None
    bent = jnp.tanh(products * (rule.scale / rule.soft_cap))
    return bent * (rule.soft_cap * LOG2E), bent


def cost(tiling: Tiling, heads: int, flops: int, arrays: tuple[Array, ...]) -> pl.CostEstimate:
    """What the compiler's scheduler is told: `flops` for every pair that is seen, one exponential, arrays once."""
    pairs = heads * tiling.pairs()
    return pl.CostEstimate(
        flops=flops * pairs, transcendentals=pairs, bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays)
    )


# ---- the arrays as kernels take them ---------------------------------------------------------------------------------


def heads_first(x: Array, present: Bool[Array, "batch length"] | None, block: int) -> Array:
    """[batch, length, heads, dim] -> [batch, heads, length, dim], absent tokens 0, padded to whole blocks."""
    if present is not None:
        x = jnp.where(present[:, :, None, None], x, 0)
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))


def presence(seen: Seen) -> tuple[Array | None, Array | None]:
    """Which queries and keys are there; None where all are. What absent ones hold must not reach a product."""
    if seen.segments is None:
        return None, None
    return seen.segments[0] != ABSENT_QUERY, seen.segments[1] != ABSENT_KEY


def id_rows(tiling: Tiling, seen: Seen) -> dict[str, Int[Array, "batch 1 length"]]:
    """Positions and segments as rows, padded to whole blocks by absent tokens; only those that the mask reads."""
    rows: dict[str, tuple[Array, int]] = {}
    if not tiling.indexed and bounds(tiling.rule) != (None, None):
        assert seen.positions is not None
        rows |= {"query_positions": (seen.positions[0], 0), "key_positions": (seen.positions[1], 0)}
    if seen.segments is not None:
        rows |= {"query_segments": (seen.segments[0], ABSENT_QUERY), "key_segments": (seen.segments[1], ABSENT_KEY)}
    padded = {}
    for name, (x, fill) in rows.items():
        block = tiling.block_q if name.startswith("query") else tiling.block_k
        padded[name] = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)[:, None]
    return padded


def id_specs(tiling: Tiling, ids: dict[str, Array], query_at: Callable, key_at: Callable) -> dict[str, pl.BlockSpec]:
    """The blocks of `id_rows`; `query_at` and `key_at` give (batch, block) for the grid's indices."""

    def spec(x: Array, block: int, at: Callable) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple[Any, int, Any]:
            batch, place = at(*grid)
            return (0 if x.shape[0] == 1 else batch), 0, place

        return pl.BlockSpec((None, 1, block), index)

    sides = {"query": (tiling.block_q, query_at), "key": (tiling.block_k, key_at)}
    return {name: spec(x, *sides[name.split("_")[0]]) for name, x in ids.items()}
