"""What the Hopper attention kernels share: their configuration, what is seen of a tile of scores, rings of buffers.

A block of threads has three warpgroups: two work on tiles in registers (wgmma), one copies to shared memory (TMA).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels._compat import gpu_load
from pallas_kernels.attention.mask import ABSENT_KEY, ABSENT_QUERY, Rule, Seen, block_map, first_last

LOG2E, LN2 = math.log2(math.e), math.log(2)
ROWS = 64
"""rows of one warpgroup's matrix product"""
WORKERS = 2
"""warpgroups that compute; one more copies"""
TILE = ROWS * WORKERS
LOWEST = -1e30
"""the running maximum before any score: finite, so that no infinity is subtracted from another"""
REGISTERS = (240, 24)
"""of each thread that computes and that copies; with three warpgroups they are all that a multiprocessor has"""
TANH_NEAR = 0.625
"""|y| below which `capped` takes the polynomial"""
TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
"""(tanh(y) - y) / y^3 as a polynomial in y^2, from the highest power down (Moshier, Cephes, tanhf.c)"""


@dataclass(frozen=True)
class Config:
    """Tokens of a step, multiples of 64 up to 256, and depths of the rings of shared buffers; else ValueError."""

    block_k: int
    """forward: keys of a step"""
    stages: int
    dq_block_k: int
    """gradient of the queries: keys of a step"""
    dq_key_stages: int
    dq_value_stages: int
    dkv_block_q: int
    """gradient of keys and values: queries of a step"""
    dkv_stages: int
    dkv_split: bool
    """one worker sums the gradient of the values, the other that of the keys, of the same 64; else each both, of 64"""

    def __post_init__(self) -> None:
        for name in ("block_k", "dq_block_k", "dkv_block_q"):
            if getattr(self, name) not in (64, 128, 192, 256):
                raise ValueError(f"{name}={getattr(self, name)} is not 64, 128, 192 or 256")


@dataclass(frozen=True)
class Sight:
    """The static part of which keys are seen, in padded lengths; `arrays` of the dynamic part go to the kernel."""

    rule: Rule
    keys: int
    """keys that are there, of `padded_keys`"""
    padded_queries: int
    padded_keys: int

    @property
    def left(self) -> int | None:
        """The greatest distance from a query back to a key."""
        return self.rule.window[0] if self.rule.window else None

    @property
    def right(self) -> int | None:
        """The greatest distance from a query on to a key."""
        right = self.rule.window[1] if self.rule.window else None
        return min(0 if right is None else right, 0) if self.rule.causal else right


def padded(x: Array, length: int, fill: int = 0) -> Array:
    """`x` with its axis 1 filled up to a multiple of `length`."""
    extra = -x.shape[1] % length
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=fill) if extra else x


def pad_tokens(seen: Seen, lengths: tuple[int, int], multiples: tuple[int, int]) -> Seen:
    """`seen` for lengths filled up to the multiples; the tokens added are absent. Unchanged where it has no arrays."""
    if seen.positions is None and seen.segments is None:
        return seen
    segments = seen.segments or tuple(jnp.zeros((1, n), jnp.int32) for n in lengths)
    fills = (ABSENT_QUERY, ABSENT_KEY)
    ids = tuple(padded(x, m, fill) for x, m, fill in zip(segments, multiples, fills, strict=True))
    if seen.positions is None:
        return Seen(None, (ids[0], ids[1]))
    where = tuple(padded(x, m) for x, m in zip(seen.positions, multiples, strict=True))
    return Seen((where[0], where[1]), (ids[0], ids[1]))


def token_arrays(tokens: Seen) -> dict[str, Array]:
    """The arrays of `tokens` by the names that `visible` knows."""
    sides: dict[str, Array] = {}
    for what, both in (("positions", tokens.positions), ("segments", tokens.segments)):
        if both is not None:
            sides |= {f"query_{what}": both[0], f"key_{what}": both[1]}
    return sides


def map_arrays(tokens: Seen, sight: Sight, block_q: int, block_k: int, by_keys: bool) -> dict[str, Array]:
    """The block map and, for each row (`by_keys`: column), the range of its blocks; nothing where a formula does."""
    if tokens.positions is None and tokens.segments is None:
        return {}
    found = block_map(tokens, sight.rule, sight.padded_queries, sight.padded_keys, block_q, block_k)
    first, stop = first_last(found.mT if by_keys else found)
    return {"map": found, "first": first, "stop": stop}


def of_batch(ref: Any, batch: Any) -> Any:
    """The index of `batch` along a first axis that may be 1."""
    return batch if ref.shape[0] > 1 else 0


def key_range(sight: Sight, r: SimpleNamespace, batch: Any, tile: Any, block_k: int) -> tuple[Any, Any]:
    """The first block of keys that queries of `tile` (of `TILE`) may see, and one past the last."""
    if hasattr(r, "map"):
        one = of_batch(r.first, batch)
        return r.first[one, tile], r.stop[one, tile]
    blocks, start = -(-sight.keys // block_k), tile * TILE
    first, stop = jnp.int32(0), jnp.int32(blocks)
    if sight.left is not None:
        first = jnp.minimum(jnp.maximum(start - sight.left, 0) // block_k, blocks)
    if sight.right is not None:
        stop = jnp.clip((start + TILE + sight.right + block_k - 1) // block_k, first, blocks)
    return first, stop


def query_range(sight: Sight, r: SimpleNamespace, batch: Any, tile: Any, columns: int, block_q: int) -> tuple[Any, Any]:
    """The first block of queries that may see keys of `tile` (of `columns`), and one past the last."""
    if hasattr(r, "map"):
        one = of_batch(r.first, batch)
        return r.first[one, tile], r.stop[one, tile]
    blocks, start = sight.padded_queries // block_q, tile * columns
    first, stop = jnp.int32(0), jnp.int32(blocks)
    if sight.right is not None:
        first = jnp.minimum(jnp.maximum(start - sight.right, 0) // block_q, blocks)
    if sight.left is not None:
        stop = jnp.clip((start + columns + sight.left + block_q - 1) // block_q, first, blocks)
    return first, stop


def whole_block(
    sight: Sight, r: SimpleNamespace, batch: Any, block: tuple[Any, Any], q: tuple[Any, int], k: tuple[Any, int]
) -> Any:
    """Whether all queries see all keys of a block of scores; `q`, `k`: (first, how many); True itself where always."""
    if hasattr(r, "map"):
        return r.map[of_batch(r.map, batch), *block] == 2
    conditions = []
    if sight.right is not None:
        conditions.append(k[0] + k[1] - 1 <= q[0] + sight.right)
    if sight.left is not None:
        conditions.append(k[0] >= q[0] + q[1] - 1 - sight.left)
    if sight.keys != sight.padded_keys:
        conditions.append(k[0] + k[1] <= sight.keys)
    return _every(conditions) if conditions else True


def _every(conditions: list[Any]) -> Any:
    found = conditions[0]
    for condition in conditions[1:]:
        found = jnp.logical_and(found, condition)
    return found


def number_tokens(r: SimpleNamespace) -> None:
    """The table 0, 1, ... in shared memory for the workers: in registers, the compiler would keep a tile of them."""
    (length,) = r.indices.shape
    layout = plgpu.Layout.WG_STRIDED((length,), vec_size=length // 128)
    r.indices[...] = plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout)
    plgpu.barrier_arrive(r.numbered)


def number_buffers(block: int) -> dict[str, Any]:
    """What `number_tokens` fills, for blocks of up to `block` tokens."""
    return {"indices": plgpu.SMEM((-(-block // 128) * 128,), jnp.int32), "numbered": plgpu.Barrier()}


@dataclass(frozen=True)
class Place:
    """Where a tile of scores lies: its batch element, its first query and key, and the axis of its queries."""

    batch: Any
    query: Any
    key: Any
    shape: tuple[int, int]
    query_axis: int


def conditions(sight: Sight, r: SimpleNamespace, at: Place) -> Iterator[Bool[Array, "rows columns"]]:
    """What all must hold for a score to be seen, for each score of a tile."""

    def side(name: str, start: Any, axis: int) -> Array:
        layout, length = plgpu.Layout.WGMMA.reduce(1 - axis), at.shape[axis]
        if not hasattr(r, name):
            return gpu_load(r.indices.at[pl.ds(0, length)], layout) + start
        ref = getattr(r, name)
        return gpu_load(ref.at[of_batch(ref, at.batch), pl.ds(start, length)], layout)

    def queries(what: str) -> Array:
        return side(f"query_{what}", at.query, at.query_axis)

    def keys(what: str) -> Array:
        return across(side(f"key_{what}", at.key, 1 - at.query_axis), at.shape, 1 - at.query_axis)

    if sight.right is not None:
        yield across(queries("positions") + sight.right, at.shape, at.query_axis) >= keys("positions")
    if sight.left is not None:
        yield across(queries("positions") - sight.left, at.shape, at.query_axis) <= keys("positions")
    if hasattr(r, "key_segments"):
        yield across(queries("segments"), at.shape, at.query_axis) == keys("segments")
    elif sight.keys != sight.padded_keys:
        yield keys("index") < sight.keys


def hide(
    sight: Sight, r: SimpleNamespace, at: Place, whole: Any, fill: float, *tiles: Float[Array, "rows columns"]
) -> tuple[Float[Array, "rows columns"], ...]:
    """The tiles with `fill` where a score is not seen; nothing is done where the block is seen as a `whole`."""
    if whole is True:
        return tiles

    def cover(*tiles: Array) -> tuple[Array, ...]:
        for condition in conditions(sight, r, at):  # one after another, to keep few of their operands in registers
            tiles = barrier(*(jnp.where(condition, tile, jnp.asarray(fill, tile.dtype)) for tile in tiles))
        return tiles

    return lax.cond(whole, lambda *tiles: tiles, cover, *tiles)


def barrier(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, which the compiler has to finish here."""
    return tuple(lax.optimization_barrier(arrays))


def capped(rule: Rule, raw: Float[Array, "m n"]) -> tuple[Float[Array, "m n"], float]:
    """(x, unit): the scores in base 2 are x * unit; with a soft cap x is tanh(scale / cap raw).

    tanh(y) to some 2^-21 of itself (the hardware's own errs by 2^-11), as Moshier's Cephes does: far from zero
    1 - 2 / (1 + exp(2 y)), whose rounding errors of 2^-24 are then small beside it, near it an odd polynomial.
    """
    if rule.soft_cap is None:
        return raw, rule.scale * LOG2E
    y = raw * (rule.scale / rule.soft_cap)
    root = lax.rsqrt(1.0 + jnp.exp2(y * (2 * LOG2E)))
    square = y * y
    rest = square * TANH[0] + TANH[1]
    for coefficient in TANH[2:]:
        rest = rest * square + coefficient
    x = jnp.where(square < TANH_NEAR**2, y + y * (square * rest), 1.0 - 2.0 * (root * root))
    return x, rule.soft_cap * LOG2E


def rows_like(value: Any) -> Float[Array, "rows"]:
    """A float32 scalar for each row of a warpgroup's tile, in registers."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zeros(shape: tuple[int, int]) -> Float[Array, "m n"]:
    """A float32 accumulator in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def across(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A vector laid along `axis` of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


class Ring(NamedTuple):
    """Shared buffers that are filled in turn: what is copied at a step, barriers of full and of free slots."""

    copies: tuple[tuple[Callable[[Any], Any], Any], ...]
    """(source of a step in global memory, buffers), all of them reported to `ready`"""
    ready: Any
    free: Any
    stages: int


def feed(rings: tuple[Ring, ...], count: Any) -> None:
    """What the copying warpgroup does: `count` steps into every ring, a slot again once the workers gave it back.

    It waits until every slot was given back, so that no barrier is left with an arrival that nobody saw.
    """

    def fetch(ring: Ring, step: Any) -> None:
        slot = lax.rem(step, jnp.int32(ring.stages))
        for source, buffers in ring.copies:
            plgpu.copy_gmem_to_smem(source(step), buffers.at[slot], ring.ready.at[slot])

    for step in range(max(ring.stages for ring in rings)):
        for ring in (ring for ring in rings if step < ring.stages):
            pl.when(step < count)(partial(fetch, ring, jnp.int32(step)))

    def turn(step: Any, _: None) -> None:
        for ring in rings:
            plgpu.barrier_wait(ring.free.at[lax.rem(step, jnp.int32(ring.stages))])
            pl.when(step + ring.stages < count)(partial(fetch, ring, step + ring.stages))

    lax.fori_loop(0, count, turn, None)


def tile_buffer(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for matrices of a 16-bit dtype, laid out as wgmma reads them."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def prepare(
    query: Array, key: Array, value: Array, seen: Seen, rule: Rule, multiples: tuple[int, int]
) -> tuple[Array, Array, Array, Seen, Sight]:
    """Inputs in lengths that tiles divide, absent tokens zero (0 times a NaN would be one), and what is seen."""
    lengths = (query.shape[1], key.shape[1])
    if seen.segments is not None:
        there = [(ids >= 0)[:, :, None, None] for ids in seen.segments]
        query = jnp.where(there[0], query, 0)
        key, value = jnp.where(there[1], key, 0), jnp.where(there[1], value, 0)
    q = padded(query, multiples[0])
    k, v = padded(key, multiples[1]), padded(value, multiples[1])
    return q, k, v, pad_tokens(seen, lengths, multiples), Sight(rule, lengths[1], q.shape[1], k.shape[1])
