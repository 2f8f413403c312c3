"""Decode attention on Hopper GPUs (sm_90a): pages by TMA into a ring of shared buffers, products by wgmma.

One warpgroup works on one share of the keys of one sequence and kv head, and begins the copies of a block as soon as
the buffer of an older one is read; two of them share a multiprocessor (up to head dim 128), so that one computes while
the other waits. The few queries of a kv head fill up to 64 rows, which wgmma always computes: at head dim 128 that is
64 operations a byte, 5 TB/s of cache ask for a third of the tensor cores, whatever the number of queries. Dot products
on the other cores would have to convert every key and value to float32, once for each query.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._compat import gpu_add_product, gpu_kernel, gpu_load
from pallas_kernels.decode_attention.cache import Blocks, Cache, Config, Rule, key_range

LOG2E, LN2 = math.log2(math.e), math.log(2)
ROWS, BLOCK = 64, 64
"""Rows of a product; keys of a block."""
LOWEST = -1e30
"""The running maximum before any score: finite, so that no infinity is subtracted from another."""
PART = 64
"""Columns of the output that are multiplied and written at a time."""
SHARED_BYTES, RESERVED = 228 * 1024, 4352
"""Shared memory of a multiprocessor; what a block of threads takes of it for row sums, barriers and the system."""
SHARES = 4 * 2 * 132
"""Blocks of threads to aim for: four rounds of two on every multiprocessor even out ragged lengths."""
LEAST_KEYS = 256
"""Keys that are worth a share of their own."""
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
DIMS = (64, 128, 192, 256)
Carry = tuple[tuple[Array, ...], Array, Array]
"""Output in parts of its columns, running maximum, sum of the weights."""


def refusal(query: Array, cache: Cache, config: Config) -> str | None:
    """Why the kernel cannot do it, or None."""
    page_size, _, head_dim = cache.key_pages.shape[1:]
    value_dim = cache.value_pages.shape[3]
    if query.dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {query.dtype}"
    if head_dim not in DIMS or value_dim not in DIMS:
        return f"takes head dims {DIMS}, not {head_dim} and {value_dim}"
    blocks = Blocks.of(page_size, config.block_k or BLOCK)
    if blocks.rows % 8 or blocks.size % ROWS:
        return f"takes pages of 8, 16, 32 or at least {ROWS} tokens and blocks of a multiple of {ROWS}, not {page_size}"
    if room(1, blocks.size, head_dim, value_dim) < (config.stages or 1):
        return f"has no room for {config.stages or 1} blocks of {blocks.size} keys"
    return None


def room(blocks_of_threads: int, block: int, head_dim: int, value_dim: int) -> int:
    """How many stages so many blocks of threads on one multiprocessor can have."""
    fixed = 2 * ROWS * head_dim + 4 * ROWS * PART + RESERVED
    return (SHARED_BYTES // blocks_of_threads - fixed) // (2 * block * (head_dim + value_dim))


def heuristic(batch: int, rows: int, cache: Cache, config: Config) -> tuple[int, int, int]:
    """(block_k, splits, stages): what `config` says, else shares for all multiprocessors, and as many stages as two
    blocks of threads on one multiprocessor have room for; where that is one stage, as one block of threads has.
    """
    block = config.block_k or BLOCK
    dims = cache.key_pages.shape[3], cache.value_pages.shape[3]
    stages = next((n for n in (room(2, block, *dims), room(1, block, *dims)) if n > 1), 1)
    tiles = batch * cache.key_pages.shape[2] * -(-rows // ROWS)
    splits = min(-(-SHARES // tiles), -(-cache.capacity // LEAST_KEYS))
    return block, config.splits or splits, config.stages or stages


@dataclass(frozen=True)
class Kernel:
    """The kernel of one shape."""

    rule: Rule
    blocks: Blocks
    queries: int
    tiles: int
    """of rows of one kv head"""
    rows: int
    """of a tile, a multiple of 8"""
    capacity: int
    splits: int
    stages: int

    def body(self, *refs: Any, **scratch: Any) -> None:
        """One share of the keys of one sequence and kv head, for one tile of queries."""
        names = ("query", "key", "value", "table", "lengths", "offsets", "out", "lse")
        r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
        r.batch, r.split, r.tile = (lax.axis_index(name) for name in ("batch", "split", "tile"))
        plgpu.copy_gmem_to_smem(r.query.at[r.batch, r.tile], r.queries.at[pl.ds(0, self.rows)], r.query_ready)
        r.length = r.lengths[r.batch]
        r.first, r.stop = key_range(r.length, self.capacity, self.rule, self.queries)
        begin, end = self.blocks.share(r.first, r.stop, r.split, self.splits)
        for stage in range(self.stages):

            @pl.when(begin + stage < end)
            def _(stage: int = stage) -> None:
                self.copy(r, r.key, r.keys, r.key_ready, begin + stage, stage)
                self.copy(r, r.value, r.values, r.value_ready, begin + stage, stage)

        plgpu.barrier_wait(r.query_ready)
        top, total = rows_like(LOWEST), rows_like(0.0)
        r.parts = [pl.ds(column, PART) for column in range(0, r.out.shape[-1], PART)]
        out = tuple(plgpu.layout_cast(jnp.zeros((ROWS, PART), jnp.float32), plgpu.Layout.WGMMA) for _ in r.parts)

        def step(block: Any, carry: Carry) -> Carry:
            return self.step(r, block, lax.rem(block - begin, jnp.int32(self.stages)), end, *carry)

        out, top, total = lax.fori_loop(begin, jnp.maximum(begin, end), step, (out, top, total))
        self.finish(r, out, top, total)

    def copy(self, r: SimpleNamespace, pages: Any, ring: Any, ready: Any, block: Any, slot: Any) -> None:
        """Begin the copies of a block. Where it has more pages than are seen, the last of these is repeated."""
        row0, _ = self.blocks.span(block)
        rows = self.blocks.rows
        for i in range(self.blocks.copies):
            at = jnp.minimum(row0 + i * rows, r.stop - 1) if self.blocks.copies > 1 else row0
            page = r.table[r.batch, lax.div(at, jnp.int32(self.blocks.page_size))]
            inside = jnp.int32(0) if self.blocks.copies > 1 else lax.rem(at, jnp.int32(self.blocks.page_size))
            head = lax.div(r.tile, jnp.int32(self.tiles))
            source = pages.at[page, pl.ds(inside, rows), head]
            plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(i * rows, rows)], ready.at[slot])

    def step(
        self, r: SimpleNamespace, block: Any, slot: Any, end: Any, out: tuple[Array, ...], top: Array, total: Array
    ) -> Carry:
        """One block of keys and values; its buffers are filled again with those of the block `stages` later."""
        later, shape = block + self.stages, (ROWS, self.blocks.size)

        def scores(accumulator: Any) -> Array:
            plgpu.wgmma(accumulator, r.queries, r.keys.at[slot].transpose((1, 0)))
            return accumulator[...]

        plgpu.barrier_wait(r.key_ready.at[slot])
        raw = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
        plgpu.commit_smem()  # all four warps have read the keys
        pl.when(later < end)(lambda: self.copy(r, r.key, r.keys, r.key_ready, later, slot))
        raw, unit = self.capped(raw)
        raw = self.hide(r, block, raw)
        higher = jnp.maximum(top, raw.max(axis=1) * unit)
        shrink = jnp.exp2(top - higher)
        weights = jnp.exp2(raw * unit - lax.broadcast_in_dim(higher, shape, [0]))
        total = total * shrink + weights.sum(axis=1)
        out = tuple(x * lax.broadcast_in_dim(shrink, x.shape, [0]) for x in out)
        plgpu.barrier_wait(r.value_ready.at[slot])
        self.erase(r, block, slot)
        narrow = weights.astype(r.value.dtype)
        parts = zip(out, r.parts, strict=True)
        out = tuple(gpu_add_product(x, narrow, r.values.at[slot, :, columns])[0] for x, columns in parts)
        plgpu.commit_smem()
        pl.when(later < end)(lambda: self.copy(r, r.value, r.values, r.value_ready, later, slot))
        return out, higher, total

    def capped(self, raw: Float[Array, "rows keys"]) -> tuple[Float[Array, "rows keys"], float]:
        """(x, unit): the scores in base 2 are x * unit.

        tanh(y) = 1 - 2 / (1 + exp(2 y)): the hardware's own has an error of 2^-11.
        """
        cap, scale = self.rule.soft_cap, self.rule.scale
        if cap is None:
            return raw, scale * LOG2E
        return 1.0 - 2.0 / (1.0 + jnp.exp2(raw * (2 * LOG2E * scale / cap))), cap * LOG2E

    def hide(self, r: SimpleNamespace, block: Any, raw: Float[Array, "rows keys"]) -> Float[Array, "rows keys"]:
        """-inf at the scores that are not seen; nothing to do for most blocks."""
        row0, own = self.blocks.span(block)
        size, last, left = self.blocks.size, r.length - self.queries - row0, self.rule.left
        whole = (size - 1 <= last) & (own == row0) & (row0 + size <= self.capacity)
        if left is not None:
            whole &= self.queries - 1 + last - left <= 0

        def hidden(raw: Float[Array, "rows keys"]) -> Float[Array, "rows keys"]:
            key = plgpu.broadcasted_iota(jnp.int32, raw.shape, 1, layout=plgpu.Layout.WGMMA)
            offsets = gpu_load(r.offsets.at[lax.rem(r.tile, jnp.int32(self.tiles))], plgpu.Layout.WGMMA.reduce(1))
            distance = lax.broadcast_in_dim(offsets, raw.shape, [0]) + last - key
            seen = (distance >= 0) & (key >= own - row0) & (key < self.capacity - row0)
            seen = seen if left is None else seen & (distance <= left)
            return jnp.where(seen, raw, -jnp.inf)

        return lax.cond(whole, lambda x: x, hidden, raw)

    def erase(self, r: SimpleNamespace, block: Any, slot: Any) -> None:
        """Zeros for the values that no query sees: their weight is 0, and they may be NaN."""
        row0, _ = self.blocks.span(block)

        def erase() -> None:
            shape, layout = (self.blocks.size, PART), plgpu.Layout.WGMMA
            at = row0 + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            for columns in r.parts:
                values = r.values.at[slot, :, columns]
                old = gpu_load(values, layout)
                values[...] = jnp.where((at >= r.first) & (at < r.stop), old, jnp.zeros_like(old))
            plgpu.commit_smem()

        pl.when((row0 < r.first) | (row0 + self.blocks.size > r.stop))(erase)

    def finish(self, r: SimpleNamespace, out: tuple[Array, ...], top: Array, total: Array) -> None:
        """Normalise, and write the rows and their log-sum-exp."""
        none = total == 0.0
        inverse = 1.0 / jnp.where(none, 1.0, total)
        r.lse_rows[...] = jnp.where(none, -jnp.inf, top * LN2 + jnp.log(total))
        rows = pl.ds(0, self.rows)
        for x, columns in zip(out, r.parts, strict=True):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            r.out_rows[...] = x * lax.broadcast_in_dim(inverse, x.shape, [0])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r.out_rows.at[rows], r.out.at[r.split, r.batch, r.tile, :, columns])
        plgpu.copy_smem_to_gmem(r.lse_rows.at[rows], r.lse.at[r.split, r.batch, r.tile])
        plgpu.wait_smem_to_gmem(0)


def rows_like(value: float) -> Float[Array, "rows"]:
    """A float32 number for each row of a tile, in registers."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def tile_buffer(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for matrices, laid out as wgmma and TMA exchange them."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


def partials(
    query: Float[Array, "batch queries heads head_dim"], cache: Cache, rule: Rule, config: Config
) -> tuple[Float[Array, "splits batch queries heads value_dim"], Float[Array, "splits batch queries heads"]]:
    """Attention over `config.splits` shares of the keys of each sequence.

    Keys and values that are seen are read once for every 64 queries times heads of a kv head, in whole pages or blocks.
    """
    batch, queries, heads, head_dim = query.shape
    page_size, kv_heads, value_dim = cache.value_pages.shape[1:]
    group = heads // kv_heads
    block, splits, stages = heuristic(batch, queries * group, cache, config)
    tiles = -(-queries * group // ROWS)
    rows = ROWS if tiles > 1 else -(-queries * group // 8) * 8
    blocks = Blocks.of(page_size, block)
    kernel = Kernel(rule, blocks, queries, tiles, rows, cache.capacity, splits, stages)
    grouped = jnp.swapaxes(query.reshape(batch, queries, kv_heads, group, head_dim), 1, 2)
    grouped = grouped.reshape(batch, kv_heads, queries * group, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, tiles * rows - queries * group), (0, 0)))
    table = jnp.clip(cache.page_table, 0, cache.key_pages.shape[0] - 1)
    offsets = (jnp.arange(tiles * ROWS, dtype=jnp.int32) // group).reshape(tiles, ROWS)
    shares = (splits, batch, kv_heads * tiles, rows)
    ring = (stages, blocks.size)
    ready = plgpu.Barrier(num_arrivals=blocks.copies, num_barriers=stages)
    out, lse = gpu_kernel(
        kernel.body,
        out_type=(jax.ShapeDtypeStruct((*shares, value_dim), jnp.float32), jax.ShapeDtypeStruct(shares, jnp.float32)),
        scratch={
            "queries": tile_buffer((ROWS, head_dim), query.dtype),
            "keys": tile_buffer((*ring, head_dim), query.dtype),
            "values": tile_buffer((*ring, value_dim), query.dtype),
            "out_rows": tile_buffer((ROWS, PART), jnp.float32),
            "lse_rows": plgpu.SMEM((ROWS,), jnp.float32),
            "query_ready": plgpu.Barrier(),
            "key_ready": ready,
            "value_ready": ready,
        },
        grid={"batch": batch, "split": splits, "tile": kv_heads * tiles},
        warpgroups=1,
        name="decode_attention",
    )(grouped.reshape(batch, kv_heads * tiles, rows, head_dim), *cache[:2], table, cache.lengths, offsets)

    def ungrouped(x: Array) -> Array:
        x = x.reshape(splits, batch, kv_heads, tiles * rows, *x.shape[4:])[:, :, :, : queries * group]
        x = jnp.swapaxes(x.reshape(*x.shape[:3], queries, group, *x.shape[4:]), 2, 3)
        return x.reshape(splits, batch, queries, heads, *x.shape[5:])

    return ungrouped(out), ungrouped(lse)
