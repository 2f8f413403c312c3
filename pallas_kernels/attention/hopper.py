"""Attention on Hopper GPUs (sm_90a) with Pallas Mosaic GPU, forward pass.

A block of threads has three warpgroups. One copies blocks of keys and values to shared memory (TMA) into a ring; two
work on 64 queries each, scores and sums in registers (wgmma). While one of the two multiplies, the other takes
exponentials: Shah et al. 2024 (2407.08608). Softmax by running maximum and sum: Dao et al. 2022 (2205.14135).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._compat import gpu_add_product, gpu_kernel, gpu_release
from pallas_kernels.attention.hopper_backward import backward
from pallas_kernels.attention.hopper_blocks import (
    LN2,
    LOG2E,
    LOWEST,
    REGISTERS,
    ROWS,
    TILE,
    WORKERS,
    Config,
    Place,
    Ring,
    Sight,
    across,
    barrier,
    capped,
    feed,
    hide,
    key_range,
    map_arrays,
    number_buffers,
    number_tokens,
    prepare,
    rows_like,
    tile_buffer,
    token_arrays,
    whole_block,
    zeros,
)
from pallas_kernels.attention.mask import Rule, Seen

__all__ = ["Config", "backward", "candidates", "forward", "heuristic", "refusal"]

CONFIGS = {
    (64, 64): Config(128, 3, 64, 3, 3, 64, 3, False),
    (128, 128): Config(128, 2, 64, 2, 2, 64, 2, False),
    (192, 128): Config(128, 2, 64, 2, 1, 64, 2, True),
    (256, 256): Config(64, 2, 64, 2, 1, 64, 2, True),
}
"""By (query and key, value) head dim: the kernels are made for these. No register spills with any mask (tested)."""
SHARED_BYTES = 227 * 1024
"""of a multiprocessor, for one block of threads"""


def heuristic(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    dtype: Any,
    rule: Rule,
) -> Config:
    """Block sizes where tuning has found none: by the head dims, to which registers and shared memory bind them."""
    dims = (query_shape[-1], value_shape[-1])
    # with the soft cap's slope the registers do not hold both sums of the keys' gradient
    return replace(
        CONFIGS[dims], dkv_split=CONFIGS[dims].dkv_split or (dims == (128, 128) and rule.soft_cap is not None)
    )


def candidates(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    dtype: Any,
    rule: Rule,
) -> list[Config]:
    """Configurations worth measuring, the heuristic's first; all fit the shared memory, not all the registers.

    The parts of forward and backward pass are independent: each is varied alone. Drop what the compiler spills.
    """
    dims = (query_shape[-1], value_shape[-1])
    base = CONFIGS[dims]
    found = [base]
    found += [replace(base, block_k=b, stages=s) for b, s in itertools.product((64, 128, 192, 256), (2, 3, 4))]
    found += [replace(base, dq_block_k=b, dq_key_stages=s, dq_value_stages=s) for b in (64, 128) for s in (2, 3)]
    found += [replace(base, dkv_block_q=b, dkv_stages=s) for b in (64, 128) for s in (1, 2, 3)]
    if base.dkv_split is False and dims == (128, 128):
        found += [replace(base, dkv_split=True, dkv_stages=s) for s in (2, 3)]
    return [config for config in dict.fromkeys(found) if shared_bytes(config, *dims) <= SHARED_BYTES]


def shared_bytes(config: Config, head_dim: int, value_dim: int) -> int:
    """Shared memory of the greediest of the three kernels; every buffer takes whole kilobytes."""
    both, small = head_dim + value_dim, 6 * 1024
    tiles = 1 if config.dkv_split else WORKERS
    forward = WORKERS * ROWS * head_dim + config.stages * config.block_k * both
    rings = config.dq_key_stages * head_dim + config.dq_value_stages * value_dim
    queries = WORKERS * ROWS * both + config.dq_block_k * rings
    keys = (tiles * ROWS + config.dkv_stages * config.dkv_block_q) * both
    return max(2 * forward + small - 3 * 1024, 2 * queries + 3 * 1024, 2 * keys + small)


def refusal(query: Array, key: Array, value: Array, rule: Rule, seen: Seen, sinks: Array | None) -> str | None:
    """Why these kernels cannot do it, or None."""
    dims = (query.shape[-1], value.shape[-1])
    if dims not in CONFIGS:
        return f"head dims (query, value) must be one of {', '.join(map(str, CONFIGS))}, not {dims}"
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f"dtypes must all be bfloat16 or all float16, not {', '.join(sorted(map(str, dtypes)))}"
    if rule.scale <= 0:
        return f"scale must be positive, not {rule.scale}"
    if min(query.shape[1], key.shape[1]) == 0:
        return f"lengths must not be 0: query has {query.shape}, key {key.shape}"
    return None


@dataclass(frozen=True)
class Forward:
    """The forward kernel of one shape."""

    sight: Sight
    config: Config
    group: int
    """query heads that share a key head"""

    def body(self, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
        """One tile of queries of one head: warpgroups 0 and 1 compute, 2 copies."""
        r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = self.sight.padded_queries // TILE - 1 - lax.axis_index("tile")  # the longest first
        first, stop = key_range(self.sight, r, batch, tile, self.config.block_k)
        wg = lax.axis_index("wg")
        pl.when(wg < WORKERS)(lambda: self.attend(r, batch, head, tile, wg, first, stop))
        pl.when(wg == WORKERS)(lambda: self.copy(r, batch, lax.div(head, jnp.int32(self.group)), first, stop))

    def copy(self, r: SimpleNamespace, batch: Any, head: Any, first: Any, stop: Any) -> None:
        """Keys and values of the blocks into their rings."""
        block, stages = self.config.block_k, self.config.stages
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        number_tokens(r)

        def of(source: Any) -> Callable[[Any], Any]:
            return lambda step: source.at[batch, pl.ds((first + step) * block, block), head]

        keys = Ring(((of(r.key), r.keys),), r.key_ready, r.key_free, stages)
        feed((keys, Ring(((of(r.value), r.values),), r.value_ready, r.value_free, stages)), stop - first)

    def attend(self, r: SimpleNamespace, batch: Any, head: Any, tile: Any, wg: Any, first: Any, stop: Any) -> None:
        """Softmax of 64 queries over the blocks of keys, and its product with the values."""
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        start = tile * TILE + wg * ROWS
        plgpu.barrier_wait(r.numbered)
        for part, columns in self.parts(r, wg):
            source = r.query.at[batch, pl.ds(start, ROWS), head, columns]
            plgpu.copy_gmem_to_smem(source, part, r.query_ready.at[wg])
        plgpu.barrier_wait(r.query_ready.at[wg])
        if hasattr(r, "sinks"):
            sink = r.sinks[head] * LOG2E
            top = rows_like(jnp.maximum(sink, LOWEST))
            total = jnp.exp2(rows_like(sink) - top)
        else:
            top, total = rows_like(LOWEST), rows_like(0.0)
        out = zeros((ROWS, r.out.shape[-1]))
        pl.when(first < stop)(lambda: plgpu.barrier_wait(r.key_ready.at[0]))
        pl.when(wg == 1)(lambda: self.take_turns(r))

        def step(i: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            return self.step(r, batch, tile, wg, i, first, stop, carry)

        out, top, total = lax.fori_loop(first, stop, step, (out, top, total))
        pl.when(wg == 0)(lambda: self.take_turns(r))
        self.finish(r, batch, head, start, wg, out, top, total)

    def parts(self, r: SimpleNamespace, wg: Any) -> list[tuple[Any, Any]]:
        """The buffers of a worker's queries and their columns: one as wide as the output, which it holds in the end."""
        width, head_dim = r.out.shape[-1], r.query.shape[-1]
        rest = [(r.queries_rest.at[wg], pl.ds(width, head_dim - width))] if head_dim > width else []
        return [(r.queries.at[wg], pl.ds(0, width)), *rest]

    def take_turns(self, r: SimpleNamespace) -> None:
        """Both workers meet; one has issued its products, the other may issue its own."""
        plgpu.barrier_arrive(r.turn)
        plgpu.barrier_wait(r.turn)

    def step(
        self,
        r: SimpleNamespace,
        batch: Any,
        tile: Any,
        wg: Any,
        i: Any,
        first: Any,
        stop: Any,
        carry: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """One block of keys."""
        out, top, total = carry
        block, stages = self.config.block_k, self.config.stages
        slot, shape = lax.rem(i - first, jnp.int32(stages)), (ROWS, block)
        # keeps what is computed from these, such as descriptors of the queries, out of registers between steps
        batch, tile, wg = barrier(batch, tile, wg)
        start = tile * TILE + wg * ROWS
        whole = whole_block(self.sight, r, batch, (tile, i), (start, ROWS), (i * block, block))

        def scores(accumulator: Any) -> Array:
            for part, columns in self.parts(r, wg):
                plgpu.wgmma(accumulator, part, r.keys.at[slot, :, columns].transpose((1, 0)))
            self.take_turns(r)
            return accumulator[...]

        raw = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
        gpu_release(r.key_free.at[slot])
        raw, unit = capped(self.sight.rule, raw)
        (raw,) = hide(self.sight, r, Place(batch, start, i * block, shape, 0), whole, -jnp.inf, raw)
        higher = jnp.maximum(top, raw.max(axis=1) * unit)
        shrink = jnp.exp2(top - higher)
        weights = jnp.exp2(raw * unit - across(higher, shape, 0))
        total = total * shrink + weights.sum(axis=1)
        out = out * across(shrink, out.shape, 0)
        narrow = weights.astype(r.value.dtype)
        out, higher, total, narrow = barrier(out, higher, total, narrow)
        plgpu.barrier_arrive(r.turn)
        plgpu.barrier_wait(r.value_ready.at[slot])
        plgpu.barrier_wait(r.turn)

        def await_next() -> None:
            following = lax.rem(i - first + 1, jnp.int32(stages))
            pl.when(i + 1 < stop)(lambda: plgpu.barrier_wait(r.key_ready.at[following]))

        out, _ = gpu_add_product(out, narrow, r.values.at[slot], await_next)
        gpu_release(r.value_free.at[slot])
        return out, higher, total

    def finish(
        self, r: SimpleNamespace, batch: Any, head: Any, start: Any, wg: Any, out: Array, top: Array, total: Array
    ) -> None:
        """Normalise, and write the rows and their log-sum-exp."""
        some = total > 0
        inverse = jnp.where(some, 1.0 / total, 0.0)
        rows = r.queries.at[wg]
        rows[...] = (out * across(inverse, out.shape, 0)).astype(r.out.dtype)
        lse = r.lse_rows.at[wg]
        lse[...] = jnp.where(some, top * LN2 + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows, r.out.at[batch, pl.ds(start, ROWS), head])
        plgpu.copy_smem_to_gmem(lse, r.lse.at[batch, head, pl.ds(start, ROWS)])
        plgpu.wait_smem_to_gmem(0)


def forward(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    sinks: Float[Array, " heads"] | None,
    seen: Seen,
    rule: Rule,
    config: Config,
) -> tuple[Float[Array, "batch query_length heads value_dim"], Float[Array, "batch heads query_length"]]:
    """(attention's output in the dtype of `value`, its float32 log-sum-exp); a row that sees no key: (0, -inf).

    Scores, softmax and sums are float32, the weights are rounded to the dtype of `value` for their product with it.
    """
    lengths = (query.shape[1], key.shape[1])
    q, k, v, tokens, sight = prepare(query, key, value, seen, rule, (TILE, config.block_k))
    batch, heads, value_dim = q.shape[0], q.shape[2], v.shape[3]
    rest = q.shape[3] - value_dim
    arrays = {"query": q, "key": k, "value": v} | token_arrays(tokens)
    arrays |= map_arrays(tokens, sight, TILE, config.block_k, by_keys=False)
    arrays |= {} if sinks is None else {"sinks": sinks.astype(jnp.float32)}
    kernel = Forward(sight, config, heads // k.shape[2])
    names = (*arrays, "out", "lse")
    stages, ring = config.stages, (config.stages, config.block_k)
    out, lse = gpu_kernel(
        lambda *refs, **scratch: kernel.body(names, *refs, **scratch),
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], value_dim), value.dtype),
            jax.ShapeDtypeStruct((batch, heads, q.shape[1]), jnp.float32),
        ),
        scratch={
            "queries": tile_buffer((WORKERS, ROWS, value_dim), q.dtype),
            "keys": tile_buffer((*ring, q.shape[3]), q.dtype),
            "values": tile_buffer((*ring, value_dim), q.dtype),
            "lse_rows": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
            "query_ready": plgpu.Barrier(num_arrivals=1 + bool(rest), num_barriers=WORKERS),
            "key_ready": plgpu.Barrier(num_barriers=stages),
            "value_ready": plgpu.Barrier(num_barriers=stages),
            "key_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            "value_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            "turn": plgpu.Barrier(num_arrivals=WORKERS),
        }
        | number_buffers(config.block_k)
        | ({"queries_rest": tile_buffer((WORKERS, ROWS, rest), q.dtype)} if rest else {}),
        grid={"batch": batch, "head": heads, "tile": q.shape[1] // TILE},
        warpgroups=WORKERS + 1,
        name="attention_forward",
    )(*arrays.values())
    return out[:, : lengths[0]], lse[:, :, : lengths[0]]
