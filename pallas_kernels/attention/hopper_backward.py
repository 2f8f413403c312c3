"""The gradients of attention on Hopper GPUs, each sum in one place and in one order, so that a run repeats bit by bit.

Two kernels recompute the weights from the log-sum-exp (Dao et al. 2022, 2205.14135): one goes over the keys for a tile
of queries, one over the queries (of all heads that share it) for a tile of keys. Where the accumulators of keys and
values do not fit the registers together (head dims 192 and 256), one warpgroup keeps each.
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

from pallas_kernels._compat import gpu_add_product, gpu_kernel, gpu_load, gpu_release
from pallas_kernels.attention import hopper_blocks as blocks
from pallas_kernels.attention.hopper_blocks import LOG2E, REGISTERS, ROWS, TILE, WORKERS, Config, Ring, Sight
from pallas_kernels.attention.mask import Rule, Seen


def slope(rule: Rule, weights: Float[Array, "m n"], x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """The weights, times the derivative 1 - x^2 of the soft cap's tanh where there is one."""
    return weights if rule.soft_cap is None else weights * (1.0 - x * x)


@dataclass(frozen=True)
class QueryGradient:
    """The kernel that sums the gradient of a tile of queries over the keys."""

    sight: Sight
    config: Config
    group: int

    def body(self, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
        """One tile of queries of one head: warpgroups 0 and 1 compute, 2 copies."""
        r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
        batch, head, wg = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("wg")
        tile = self.sight.padded_queries // TILE - 1 - lax.axis_index("tile")  # the longest first
        first, stop = blocks.key_range(self.sight, r, batch, tile, self.config.dq_block_k)
        pl.when(wg < WORKERS)(lambda: self.work(r, batch, head, tile, wg, first, stop))
        pl.when(wg == WORKERS)(lambda: self.copy(r, batch, lax.div(head, jnp.int32(self.group)), first, stop))

    def copy(self, r: SimpleNamespace, batch: Any, head: Any, first: Any, stop: Any) -> None:
        """Keys and values of the blocks into their rings."""
        block = self.config.dq_block_k
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        blocks.number_tokens(r)

        def of(source: Any) -> Any:
            return lambda step: source.at[batch, pl.ds((first + step) * block, block), head]

        keys = Ring(((of(r.key), r.keys),), r.key_ready, r.key_free, self.config.dq_key_stages)
        values = Ring(((of(r.value), r.values),), r.value_ready, r.value_free, self.config.dq_value_stages)
        blocks.feed((keys, values), stop - first)

    def work(self, r: SimpleNamespace, batch: Any, head: Any, tile: Any, wg: Any, first: Any, stop: Any) -> None:
        """The gradient of 64 queries."""
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        start = tile * TILE + wg * ROWS
        rows = pl.ds(start, ROWS)
        plgpu.barrier_wait(r.numbered)
        plgpu.copy_gmem_to_smem(r.query.at[batch, rows, head], r.queries.at[wg], r.query_ready.at[wg])
        plgpu.copy_gmem_to_smem(r.d_out.at[batch, rows, head], r.d_outs.at[wg], r.query_ready.at[wg])
        for i, source in enumerate((r.lse, r.delta)):
            plgpu.copy_gmem_to_smem(source.at[batch, head, rows], r.lses_deltas.at[i, wg], r.query_ready.at[wg])
        plgpu.barrier_wait(r.query_ready.at[wg])

        def step(i: Any, total: Array) -> Array:
            return self.step(r, batch, tile, start, wg, i, first, total)

        total = lax.fori_loop(first, stop, step, blocks.zeros((ROWS, r.query.shape[-1])))
        result = r.queries.at[wg]
        result[...] = (total * self.sight.rule.scale).astype(r.d_query.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, r.d_query.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def step(
        self, r: SimpleNamespace, batch: Any, tile: Any, start: Any, wg: Any, i: Any, first: Any, total: Array
    ) -> Array:
        """One block of keys."""
        block, by_row = self.config.dq_block_k, plgpu.Layout.WGMMA.reduce(1)
        shape = (ROWS, block)
        slot = lax.rem(i - first, jnp.int32(self.config.dq_key_stages))
        value_slot = lax.rem(i - first, jnp.int32(self.config.dq_value_stages))
        # keeps what is computed from these, such as descriptors of tiles, out of registers between steps
        batch, tile, wg, value_slot = blocks.barrier(batch, tile, wg, value_slot)
        start = tile * TILE + wg * ROWS
        whole = blocks.whole_block(self.sight, r, batch, (tile, i), (start, ROWS), (i * block, block))

        def score(scores: Any) -> None:
            plgpu.barrier_wait(r.key_ready.at[slot])
            plgpu.wgmma(scores, r.queries.at[wg], r.keys.at[slot].transpose((1, 0)))

        def multiply(products: Any) -> None:
            plgpu.barrier_wait(r.value_ready.at[value_slot])
            plgpu.wgmma(products, r.d_outs.at[wg], r.values.at[value_slot].transpose((1, 0)))

        def weigh(scores: Any, in_flight: int) -> Array:
            x, unit = blocks.capped(self.sight.rule, plgpu.wgmma_accumulator_load(scores, wait_n=in_flight))
            lse = gpu_load(r.lses_deltas.at[0, wg], by_row)
            return slope(self.sight.rule, jnp.exp2(x * unit - blocks.across(lse, shape, 0)), x)

        def both(scores: Any, products: Any) -> tuple[Array, Array]:
            score(scores)
            multiply(products)
            return weigh(scores, 1), products[...]

        def first_scores(scores: Any) -> Array:
            score(scores)
            return weigh(scores, 0)

        def then_products(products: Any) -> Array:
            multiply(products)
            return products[...]

        accumulator = plgpu.ACC(shape, jnp.float32)
        if r.query.shape[-1] < 256:
            weights, product = pl.run_scoped(both, accumulator, accumulator)
        else:  # the registers do not hold both beside the operands of the mask
            (weights,) = blocks.barrier(pl.run_scoped(first_scores, accumulator))
            product = pl.run_scoped(then_products, accumulator)
        gpu_release(r.value_free.at[value_slot])
        delta = gpu_load(r.lses_deltas.at[1, wg], by_row)
        d_scores = (weights * (product - blocks.across(delta, shape, 0))).astype(r.key.dtype)
        # hidden last, when the fewest registers are in use
        (d_scores,) = blocks.hide(self.sight, r, blocks.Place(batch, start, i * block, shape, 0), whole, 0.0, d_scores)
        total, _ = gpu_add_product(total, d_scores, r.keys.at[slot])
        gpu_release(r.key_free.at[slot])
        return total


@dataclass(frozen=True)
class KeyGradient:
    """The kernel that sums the gradients of a tile of keys and values over the queries of all heads that share it."""

    sight: Sight
    config: Config
    group: int

    @property
    def parts(self) -> int:
        """Tiles of 64 keys that a block of threads works on."""
        return 1 if self.config.dkv_split else WORKERS

    def body(self, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
        """One tile of keys of one head: warpgroups 0 and 1 compute, 2 copies."""
        r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
        batch, head, wg, tile = (lax.axis_index(name) for name in ("batch", "head", "wg", "tile"))
        block, columns = self.config.dkv_block_q, self.parts * ROWS
        first, stop = blocks.query_range(self.sight, r, batch, tile, columns, block)
        at = SimpleNamespace(batch=batch, head=head, tile=tile, first=first, blocks=stop - first)
        pl.when(wg == WORKERS)(lambda: self.copy(r, at))
        if not self.config.dkv_split:
            pl.when(wg < WORKERS)(lambda: self.work(r, at, wg, keys=True, values=True))
        else:
            pl.when(wg == 0)(lambda: self.work(r, at, 0, keys=False, values=True))
            pl.when(wg == 1)(lambda: self.work(r, at, 0, keys=True, values=False))

    def copy(self, r: SimpleNamespace, at: SimpleNamespace) -> None:
        """The tile of keys and values once, then queries and gradients of the output, head by head."""
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        blocks.number_tokens(r)
        for part in range(self.parts):
            rows = pl.ds((at.tile * self.parts + part) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(r.key.at[at.batch, rows, at.head], r.keys.at[part], r.tile_ready)
            plgpu.copy_gmem_to_smem(r.value.at[at.batch, rows, at.head], r.values.at[part], r.tile_ready)

        def place(step: Any) -> tuple[Any, Any]:
            blocks = jnp.maximum(at.blocks, 1)
            start = (at.first + lax.rem(step, blocks)) * self.config.dkv_block_q
            return at.head * self.group + lax.div(step, blocks), pl.ds(start, self.config.dkv_block_q)

        def matrix(source: Any) -> Any:
            return lambda step: source.at[at.batch, place(step)[1], place(step)[0]]

        def vector(source: Any) -> Any:
            return lambda step: source.at[at.batch, *place(step)]

        stages = self.config.dkv_stages
        first = ((matrix(r.query), r.queries), (vector(r.lse), r.lses))
        second = ((matrix(r.d_out), r.d_outs), (vector(r.delta), r.deltas))
        rings = (Ring(first, r.query_ready, r.query_free, stages), Ring(second, r.d_out_ready, r.d_out_free, stages))
        blocks.feed(rings, self.group * at.blocks)

    def work(self, r: SimpleNamespace, at: SimpleNamespace, part: Any, keys: bool, values: bool) -> None:
        """Gradients of 64 keys, of 64 values, or of both."""
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        start = (at.tile * self.parts + part) * ROWS
        d_key = blocks.zeros((ROWS, r.key.shape[-1])) if keys else None
        d_value = blocks.zeros((ROWS, r.value.shape[-1])) if values else None
        plgpu.barrier_wait(r.numbered)
        plgpu.barrier_wait(r.tile_ready)

        def step(i: Any, carry: tuple[Array | None, Array | None]) -> tuple[Array | None, Array | None]:
            return self.step(r, at, part, i, *carry)

        d_key, d_value = lax.fori_loop(0, self.group * at.blocks, step, (d_key, d_value))
        if self.config.dkv_split:  # the results overwrite what the other worker reads
            plgpu.barrier_arrive(r.done)
            plgpu.barrier_wait(r.done)
        rows = pl.ds(start, ROWS)
        if d_key is not None:
            r.keys.at[part][...] = (d_key * self.sight.rule.scale).astype(r.d_key.dtype)
        if d_value is not None:
            r.values.at[part][...] = d_value.astype(r.d_value.dtype)
        plgpu.commit_smem()
        if d_key is not None:
            plgpu.copy_smem_to_gmem(r.keys.at[part], r.d_key.at[at.batch, rows, at.head])
        if d_value is not None:
            plgpu.copy_smem_to_gmem(r.values.at[part], r.d_value.at[at.batch, rows, at.head])
        plgpu.wait_smem_to_gmem(0)

    def step(
        self,
        r: SimpleNamespace,
        at: SimpleNamespace,
        part: Any,
        i: Any,
        d_key: Array | None,
        d_value: Array | None,
    ) -> tuple[Array | None, Array | None]:
        """One block of queries; rows of the tile are keys, its columns queries."""
        block, by_column = self.config.dkv_block_q, plgpu.Layout.WGMMA.reduce(0)
        shape, slot = (ROWS, block), lax.rem(i, jnp.int32(self.config.dkv_stages))
        batch, tile, part = blocks.barrier(at.batch, at.tile, jnp.int32(part))  # as for the queries' gradient
        start, query_block = (tile * self.parts + part) * ROWS, at.first + lax.rem(i, at.blocks)
        q = query_block * block
        whole = blocks.whole_block(self.sight, r, batch, (query_block, tile), (q, block), (start, ROWS))

        def weigh(scores: Any, in_flight: int) -> tuple[Array, ...]:
            x, unit = blocks.capped(self.sight.rule, plgpu.wgmma_accumulator_load(scores, wait_n=in_flight))
            lse = gpu_load(r.lses.at[slot], by_column)
            weights = jnp.exp2(x * unit - blocks.across(lse, shape, 1))
            place = blocks.Place(batch, q, start, shape, 1)
            if self.sight.rule.soft_cap is None:  # one tile to hide in place of two
                (weights,) = blocks.hide(self.sight, r, place, whole, 0.0, weights)
                return (weights.astype(r.key.dtype), weights)
            narrow, bent = weights.astype(r.key.dtype), slope(self.sight.rule, weights, x)
            return blocks.hide(self.sight, r, place, whole, 0.0, narrow, bent)

        def score(scores: Any) -> None:
            plgpu.barrier_wait(r.query_ready.at[slot])
            plgpu.wgmma(scores, r.keys.at[part], r.queries.at[slot].transpose((1, 0)))

        def alone(scores: Any) -> tuple[Array, ...]:
            score(scores)
            plgpu.barrier_wait(r.d_out_ready.at[slot])
            return weigh(scores, 0)

        def both(scores: Any, products: Any) -> tuple[Array, ...]:
            score(scores)
            plgpu.barrier_wait(r.d_out_ready.at[slot])
            plgpu.wgmma(products, r.values.at[part], r.d_outs.at[slot].transpose((1, 0)))
            return *weigh(scores, 1), products[...]

        accumulator = plgpu.ACC(shape, jnp.float32)
        found = pl.run_scoped(*((alone, accumulator) if d_key is None else (both, accumulator, accumulator)))

        def differentiate() -> Array | None:
            if d_key is None:
                return None
            delta = gpu_load(r.deltas.at[slot], by_column)
            return (found[-2] * (found[-1] - blocks.across(delta, shape, 1))).astype(r.key.dtype)

        if d_value is not None:
            d_value, d_scores = gpu_add_product(d_value, found[0], r.d_outs.at[slot], differentiate)
        else:
            d_scores = differentiate()
        gpu_release(r.d_out_free.at[slot])
        if d_key is not None:
            d_key, _ = gpu_add_product(d_key, d_scores, r.queries.at[slot])
        gpu_release(r.query_free.at[slot])
        return d_key, d_value


def backward(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    lse: Float[Array, "batch heads query_length"],
    delta: Float[Array, "batch heads query_length"],
    d_out: Float[Array, "batch query_length heads value_dim"],
    seen: Seen,
    rule: Rule,
    config: Config,
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value, in their shapes and dtypes; those of shared heads summed in float32.

    `delta` is sum(d_out * out) over the head dim, less the gradient of `lse`. Weights and their gradient are rounded to
    the inputs' dtype for the products, all sums are float32.
    """
    columns = ROWS if config.dkv_split else TILE
    multiples = (math.lcm(TILE, config.dkv_block_q), math.lcm(columns, config.dq_block_k))
    lengths = (query.shape[1], key.shape[1])
    q, k, v, tokens, sight = blocks.prepare(query, key, value, seen, rule, multiples)
    if seen.segments is not None:
        there = seen.segments[0] >= 0
        d_out, delta = jnp.where(there[:, :, None, None], d_out, 0), jnp.where(there[:, None], delta, 0)
    # a row that sees nothing has weights exp(score - infinity) = 0
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse) * LOG2E
    rows = ((0, 0), (0, 0), (0, q.shape[1] - lengths[0]))
    inputs = {
        "query": q,
        "key": k,
        "value": v,
        "d_out": blocks.padded(d_out.astype(q.dtype), multiples[0]),
        "lse": jnp.pad(lse, rows, constant_values=jnp.inf),
        "delta": jnp.pad(delta, rows),
    }
    d_query = query_gradient(inputs, tokens, sight, config)
    d_key, d_value = key_gradient(inputs, tokens, sight, config)
    return d_query[:, : lengths[0]], d_key[:, : lengths[1]], d_value[:, : lengths[1]]


def query_gradient(inputs: dict[str, Array], tokens: Seen, sight: Sight, config: Config) -> Array:
    """The gradient of the padded queries."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    arrays = inputs | blocks.token_arrays(tokens)
    arrays |= blocks.map_arrays(tokens, sight, TILE, config.dq_block_k, by_keys=False)
    kernel, names = QueryGradient(sight, config, q.shape[2] // k.shape[2]), (*arrays, "d_query")
    keys, values = config.dq_key_stages, config.dq_value_stages
    return gpu_kernel(
        lambda *refs, **scratch: kernel.body(names, *refs, **scratch),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch={
            "queries": blocks.tile_buffer((WORKERS, ROWS, q.shape[3]), q.dtype),
            "d_outs": blocks.tile_buffer((WORKERS, ROWS, v.shape[3]), q.dtype),
            "keys": blocks.tile_buffer((keys, config.dq_block_k, q.shape[3]), q.dtype),
            "values": blocks.tile_buffer((values, config.dq_block_k, v.shape[3]), q.dtype),
            "lses_deltas": plgpu.SMEM((2, WORKERS, ROWS), jnp.float32),  # one buffer: each is rounded up to 1 KB
            "query_ready": plgpu.Barrier(num_arrivals=4, num_barriers=WORKERS),
            "key_ready": plgpu.Barrier(num_barriers=keys),
            "value_ready": plgpu.Barrier(num_barriers=values),
            "key_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=keys),
            "value_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=values),
        }
        | blocks.number_buffers(config.dq_block_k),
        grid={"batch": q.shape[0], "head": q.shape[2], "tile": q.shape[1] // TILE},
        warpgroups=WORKERS + 1,
        name="attention_query_gradient",
    )(*arrays.values())


def key_gradient(inputs: dict[str, Array], tokens: Seen, sight: Sight, config: Config) -> tuple[Array, Array]:
    """The gradients of the padded keys and values."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    kernel = KeyGradient(sight, config, q.shape[2] // k.shape[2])
    columns, block, stages = kernel.parts * ROWS, config.dkv_block_q, config.dkv_stages
    arrays = inputs | blocks.token_arrays(tokens)
    arrays |= blocks.map_arrays(tokens, sight, block, columns, by_keys=True)
    names = (*arrays, "d_key", "d_value")
    d_key, d_value = gpu_kernel(
        lambda *refs, **scratch: kernel.body(names, *refs, **scratch),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch={
            "keys": blocks.tile_buffer((kernel.parts, ROWS, k.shape[3]), k.dtype),
            "values": blocks.tile_buffer((kernel.parts, ROWS, v.shape[3]), k.dtype),
            "queries": blocks.tile_buffer((stages, block, q.shape[3]), k.dtype),
            "d_outs": blocks.tile_buffer((stages, block, v.shape[3]), k.dtype),
            "lses": plgpu.SMEM((stages, block), jnp.float32),
            "deltas": plgpu.SMEM((stages, block), jnp.float32),
            "tile_ready": plgpu.Barrier(num_arrivals=2 * kernel.parts),
            "query_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "d_out_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "query_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            "d_out_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            "done": plgpu.Barrier(num_arrivals=WORKERS),
        }
        | blocks.number_buffers(block),
        grid={"batch": k.shape[0], "head": k.shape[2], "tile": k.shape[1] // columns},
        warpgroups=WORKERS + 1,
        name="attention_key_gradient",
    )(*arrays.values())
    return d_key, d_value
