"""Attention on TPU, forward pass: blocks of scores stay in fast memory, and blocks that nobody sees are not fetched.

The grid runs over batch, heads, blocks of queries and, innermost, the blocks of keys that those queries see. Online
softmax (Milakov and Gimelshein 2018, 1805.02867; Dao et al. 2022, 2205.14135) in base 2, a part of a block of keys at
a time, so that products and exponentials of different parts overlap.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Rule, Seen
from pallas_kernels.attention.tpu_backward import backward
from pallas_kernels.attention.tpu_blocks import (
    EVERYTHING,
    LANES,
    LOG2E,
    MASKED,
    SOME,
    VMEM_BYTES,
    Config,
    Tiling,
    base2,
    cost,
    dot,
    heads_first,
    id_rows,
    id_specs,
    presence,
    quotient,
    tile,
    visible,
    visits,
)

__all__ = ["Config", "backward", "candidates", "forward", "heuristic", "refusal"]

TABLE_BYTES = 2**19
"""What the table of visible blocks may take of a core's scalar memory (1 MiB)."""
DTYPES = (jnp.bfloat16, jnp.float32)


def heuristic(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    dtype: Any,
    rule: Rule,
) -> Config:
    """Block sizes for these shapes (`[batch, length, heads, head_dim]`) where no tuned ones are known."""
    lanes = sum(-(-shape[-1] // LANES) * LANES for shape in (key_shape, value_shape))
    size = jnp.dtype(dtype).itemsize
    wide = lanes * size > 2 * LANES * 4
    block = 512 if wide else 1024
    left, right = rule.window or (None, None)
    reach = None if left is None or (right is None and not rule.causal) else left + (0 if rule.causal else right or 0)
    if reach is not None and reach < block:
        block = 512
    # Sums in float32, and results of the inputs' size twice: the last is written while the next is made.
    resident = max(VMEM_BYTES // 2 // (lanes * (4 + 2 * size)) // 1024 * 1024, 1024)
    return Config(block, block, min(block, 512), block, block, min(block, 512), resident)


def candidates(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    dtype: Any,
    rule: Rule,
) -> list[Config]:
    """Configurations worth trying, the heuristic one first; each distinct after fitting to the lengths."""
    start = heuristic(query_shape, key_shape, value_shape, dtype, rule)
    found = [start]
    for block_q, block_k, compute in (
        *((2048, 1024, 512), (1024, 2048, 512), (1024, 1024, 256), (1024, 1024, 1024), (1024, 512, 512)),
        *((512, 1024, 512), (512, 512, 512), (512, 512, 256), (256, 512, 256), (256, 256, 256)),
    ):
        if block_q < 2 * query_shape[1] and block_k < 2 * key_shape[1]:
            found.append(Config(block_q, block_k, compute, block_q, block_k, compute, start.resident))
    return list(dict.fromkeys(found))


def refusal(query: Array, key: Array, value: Array, rule: Rule, seen: Seen, sinks: Array | None) -> str | None:
    """Why these kernels cannot compute this, or None where they can."""
    if not (query.dtype == key.dtype == value.dtype):
        return f"query, key and value must share a dtype, not {query.dtype}, {key.dtype}, {value.dtype}"
    if query.dtype not in DTYPES:
        return f"dtype must be bfloat16 or float32, not {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > 512:
        return f"head dims must be at most 512, not {query.shape[-1]} and {value.shape[-1]}"
    if min(query.shape[1], key.shape[1]) == 0:
        return f"lengths must not be 0: query has {query.shape}, key {key.shape}"
    if seen != Seen(None, None):
        rows = max(x.shape[0] for pair in seen if pair is not None for x in pair)
        blocks = [-(-x.shape[1] // 512) for x in (query, key)]
        if 4 * rows * blocks[0] * blocks[1] > TABLE_BYTES:
            return f"the table of {rows} x {blocks[0]} x {blocks[1]} blocks does not fit scalar memory"
    return None


# ---- forward ---------------------------------------------------------------------------------------------------------


def forward(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    sinks: Float[Array, " heads"] | None,
    seen: Seen,
    rule: Rule,
    config: Config,
) -> tuple[Float[Array, "batch query_length heads value_dim"], Float[Array, "batch heads query_length"]]:
    """softmax(scores) value and the scores' log-sum-exp, natural and float32, over the keys that a query sees.

    Bfloat16 or float32; sums are float32. A query without keys gives 0 and the sink, or -inf without one. Sinks are
    scores of one more key whose value is 0 (OpenAI 2025, 2508.10925).
    """
    (batch, length, heads, head_dim), kv_heads, value_dim = query.shape, key.shape[2], value.shape[3]
    tiling = tile((length, key.shape[1]), seen, rule, config.block_q, config.block_k, config.compute)
    block_q, block_k = tiling.block_q, tiling.block_k
    there = presence(seen)
    table, steps = visits(tiling, seen)
    ids = id_rows(tiling, seen)
    total = jnp.promote_types(query.dtype, jnp.float32)
    operands = {
        "query": heads_first(query, there[0], block_q),
        "key": heads_first(key, there[1], block_k),
        "value": heads_first(value, there[1], block_k),
        "ids": ids,
        "sinks": None if sinks is None else sinks.astype(total),
    }

    specs, query_at = blocks(tiling, heads // kv_heads, (head_dim, value_dim), ids, sinks)
    padded = tiling.rows * block_q
    # Two cores share a parallel axis in halves: rows of a causal mask would be unequal ones, heads are not.
    order: Any = ("parallel", "parallel", "parallel" if batch * heads == 1 else "arbitrary", "arbitrary")
    out, lse = pl.pallas_call(
        functools.partial(forward_kernel, tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tiling.rows, steps),
            in_specs=[specs],
            out_specs=[
                pl.BlockSpec((None, None, block_q, value_dim), query_at),
                pl.BlockSpec((None, None, 1, block_q), lambda b, n, i, s, table: (b, n, 0, i)),
            ],
            scratch_shapes=[pltpu.VMEM((block_q, width), total) for width in (LANES, LANES, value_dim)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, padded, value_dim), value.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, padded), total),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=cost(tiling, batch * heads, 2 * (head_dim + value_dim), (query, key, value, query)),
        name="attention_forward",
    )(table, operands)
    return jnp.swapaxes(out[:, :, :length], 1, 2), lse[:, :, 0, :length]


def blocks(
    tiling: Tiling, group: int, dims: tuple[int, int], ids: Any, sinks: Array | None
) -> tuple[dict[str, Any], Callable[..., tuple[Any, ...]]]:
    """The block of each operand that a step of the grid works on, and the index of its block of queries."""

    def query_at(b: Any, n: Any, i: Any, s: Any, table: Any) -> tuple[Any, Any, Any, int]:
        return b, n, i, 0

    def key_at(b: Any, n: Any, i: Any, s: Any, table: Any) -> tuple[Any, Any, Any, int]:
        return b, quotient(n, group), tiling.locate(b, i, s, table)[0], 0

    specs = {
        "query": pl.BlockSpec((None, None, tiling.block_q, dims[0]), query_at),
        "key": pl.BlockSpec((None, None, tiling.block_k, dims[0]), key_at),
        "value": pl.BlockSpec((None, None, tiling.block_k, dims[1]), key_at),
        "ids": id_specs(tiling, ids, lambda *at: query_at(*at)[::2][:2], lambda *at: key_at(*at)[::2][:2]),
        "sinks": None if sinks is None else pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    return specs, query_at


def forward_kernel(
    tiling: Tiling, table: Any, operands: dict[str, Any], out: Any, lse: Any, top: Any, total: Any, weighted: Any
) -> None:
    """One block of scores. `top`: the rows' maxima so far; `total`: lanes' sums of weights; `weighted`: of values."""
    batch, head, row, step = (pl.program_id(axis) for axis in range(4))
    block, kind = tiling.locate(batch, row, step, table)

    @pl.when(step == 0)
    def start_row() -> None:
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def attend(masked: bool) -> None:
        for start in range(0, tiling.block_k, tiling.compute):
            part = slice(start, start + tiling.compute)
            scores, _ = base2(dot(operands["query"][...], operands["key"][part], (1, 1)), tiling.rule)
            if masked:
                origin = (row * tiling.block_q, block * tiling.block_k + start)
                scores = jnp.where(visible(tiling, origin, scores.shape, False, operands["ids"], part), scores, MASKED)
            online(scores, operands["value"][part], top, total, weighted)

    if not tiling.unmasked:
        pl.when(kind == SOME)(lambda: attend(True))
    pl.when(kind == EVERYTHING)(lambda: attend(False))

    @pl.when(step == pl.num_programs(3) - 1)
    def end_row() -> None:
        finish(None if operands["sinks"] is None else operands["sinks"][head], out, lse, top, total, weighted)


def online(scores: Array, values: Array, top: Any, total: Any, weighted: Any) -> None:
    """Fold a tile of base-2 scores into the running softmax."""
    before = top[...]
    now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    top[...] = now
    shrink = jnp.exp2(before - now)
    parts = range(0, scores.shape[1], LANES)
    weights = jnp.exp2(scores - jnp.tile(now, (1, len(parts))))
    # Sums stay spread over the lanes until the end: crossing lanes is the slow part of a sum.
    total[...] = total[...] * shrink + sum(weights[:, part : part + LANES] for part in parts)
    weighted[...] = spread(shrink, weighted.shape[1]) * weighted[...] + dot(
        weights.astype(values.dtype), values, (1, 0)
    )


def spread(x: Float[Array, "rows 128"], width: int) -> Float[Array, "rows width"]:
    """Equal lanes, as many as `width`."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def finish(sink: Any, out: Any, lse: Any, top: Any, total: Any, weighted: Any) -> None:
    """Divide by the sum of weights and write the block of outputs and log-sum-exps."""
    highest = top[...]
    sums = jnp.broadcast_to(jnp.sum(total[...], axis=1, keepdims=True), highest.shape)
    # A maximum may pass over NaN, a sum does not: such rows are not empty.
    empty = (highest <= 0.5 * MASKED) & (sums == sums)
    if sink is None:
        factor = 1 / sums
        logarithm = jnp.where(empty, -jnp.inf, highest / LOG2E + jnp.log(sums))
    else:
        most = jnp.maximum(highest, sink * LOG2E)
        shrink = jnp.exp2(highest - most)
        sums = sums * shrink + jnp.exp2(sink * LOG2E - most)
        factor = shrink / sums
        logarithm = most / LOG2E + jnp.log(sums)
    width = weighted.shape[1]
    result = weighted[...] * spread(factor, width)
    out[...] = jnp.where(spread(empty.astype(jnp.int32), width) > 0, 0, result).astype(out.dtype)
    lse[...] = logarithm.T[:1]
