"""Attention on TPU, backward pass: one kernel makes the gradients of queries, keys and values from one set of scores.

The grid runs over batch, heads of keys, their query heads, blocks of queries and, innermost, the blocks of keys that
those queries see. A block of query gradients is summed while its keys pass by; those of all keys stay in vector memory
while all queries of all their heads pass by, so that groups are summed in float32 and nothing is written twice. More
keys than fit are worked on in turns, which add to the queries' gradients. Tiles are key by query: log-sum-exp and
delta are then rows, and only one of the five products needs a transposed tile. Dao 2023, 2307.08691.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Rule, Seen
from pallas_kernels.attention.tpu_blocks import (
    EVERYTHING,
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
    tile,
    visible,
    visits,
)


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
) -> tuple[
    Float[Array, "batch query_length heads head_dim"],
    Float[Array, "batch key_length kv_heads head_dim"],
    Float[Array, "batch key_length kv_heads value_dim"],
]:
    """Gradients of query, key and value in their dtypes; sums, also those over a group's heads, are float32.

    `lse` and `delta` (sum of d_out * out, less the gradient of lse) are float32.
    """
    lengths = (query.shape[1], key.shape[1])
    blocks = (config.backward_block_q, config.backward_block_k, config.backward_compute)
    tiling = tile(lengths, seen, rule, *blocks)
    there = presence(seen)
    rows = ((0, 0), (0, 0), (0, -lengths[0] % tiling.block_q))
    operands: dict[str, Any] = {
        "query": heads_first(query, there[0], tiling.block_q),
        "d_out": heads_first(d_out.astype(value.dtype), there[0], tiling.block_q),
        "key": heads_first(key, there[1], tiling.block_k),
        "value": heads_first(value, there[1], tiling.block_k),
        # A row without keys, or one that is padding, gets weight exp2(score - inf) = 0.
        "lse": jnp.pad(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), rows, constant_values=jnp.inf)[:, :, None],
        "delta": jnp.pad(delta, rows)[:, :, None],
        "ids": id_rows(tiling, seen),
        "d_query": None,
    }
    turn = max(config.resident // tiling.block_k, 1)
    columns = range(0, tiling.columns, turn)
    d_keys, d_values = [], []
    for start in columns:
        part = dataclasses.replace(tiling, part=(start, min(start + turn, tiling.columns)))
        d_query, d_key, d_value = backward_part(part, operands, seen, len(columns) == 1)
        operands["d_query"] = d_query
        d_keys.append(d_key)
        d_values.append(d_value)
    grads = (operands["d_query"].astype(query.dtype), jnp.concatenate(d_keys, 2), jnp.concatenate(d_values, 2))
    cut = (lengths[0], lengths[1], lengths[1])
    d_query, d_key, d_value = (jnp.swapaxes(x[:, :, :length], 1, 2) for x, length in zip(grads, cut))
    return d_query, d_key, d_value


def backward_part(tiling: Tiling, operands: dict[str, Any], seen: Seen, alone: bool) -> tuple[Array, Array, Array]:
    """Gradients of the tiling's part of the keys, and of all queries: float32, added to, unless the part is `alone`."""
    (batch, heads, padded, head_dim), value_dim = operands["query"].shape, operands["value"].shape[3]
    kv_heads, dtype = operands["key"].shape[1], operands["query"].dtype
    group, block_q, block_k = heads // kv_heads, tiling.block_q, tiling.block_k
    table, steps = visits(tiling, seen)
    total = operands["lse"].dtype
    keys = tiling.columns * block_k

    def query_at(b: Any, n: Any, g: Any, i: Any, s: Any, table: Any) -> tuple[Any, Any, Any, int]:
        return b, n * group + g, i, 0

    def key_at(b: Any, n: Any, g: Any, i: Any, s: Any, table: Any) -> tuple[Any, Any, Any, int]:
        return b, n, tiling.part[0] + tiling.locate(b, i, s, table)[0], 0

    def all_keys(b: Any, n: Any, g: Any, i: Any, s: Any, table: Any) -> tuple[Any, Any, int, int]:
        return b, n, 0, 0

    row = pl.BlockSpec((None, None, 1, block_q), lambda b, n, g, i, s, table: (b, n * group + g, 0, i))
    by_query = pl.BlockSpec((None, None, block_q, head_dim), query_at)
    specs = {
        "query": by_query,
        "d_out": pl.BlockSpec((None, None, block_q, value_dim), query_at),
        "key": pl.BlockSpec((None, None, block_k, head_dim), key_at),
        "value": pl.BlockSpec((None, None, block_k, value_dim), key_at),
        "lse": row,
        "delta": row,
        "ids": id_specs(tiling, operands["ids"], lambda *at: query_at(*at)[::2][:2], lambda *at: key_at(*at)[::2][:2]),
        "d_query": None if operands["d_query"] is None else by_query,
    }
    arrays = tuple(operands[name] for name in ("query", "d_out", "key", "value", "query"))
    # The sum so far is read and written block by block, in place.
    leaves = [path[-1] for path, _ in jax.tree_util.tree_leaves_with_path((table, operands))]
    sums = {i: 0 for i, leaf in enumerate(leaves) if leaf == jax.tree_util.DictKey("d_query")}
    return pl.pallas_call(
        functools.partial(backward_kernel, tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, group, tiling.rows, steps),
            in_specs=[specs],
            out_specs=[by_query, *(pl.BlockSpec((None, None, keys, d), all_keys) for d in (head_dim, value_dim))],
            scratch_shapes=[
                pltpu.VMEM((rows, d), total) for rows, d in ((block_q, head_dim), (keys, head_dim), (keys, value_dim))
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, padded, head_dim), dtype if alone else total),
            *(jax.ShapeDtypeStruct((batch, kv_heads, keys, d), dtype) for d in (head_dim, value_dim)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=cost(tiling, batch * heads, 6 * head_dim + 4 * value_dim, arrays),
        input_output_aliases=sums,
        name="attention_backward",
    )(table, operands)


def backward_kernel(
    tiling: Tiling,
    table: Any,
    operands: dict[str, Any],
    d_query: Any,
    d_key: Any,
    d_value: Any,
    query_sum: Any,
    key_sum: Any,
    value_sum: Any,
) -> None:
    """One block of scores, a part of its keys at a time, added to the three sums."""
    batch, _, member, row, step = (pl.program_id(axis) for axis in range(5))
    block, kind = tiling.locate(batch, row, step, table)
    at_end = step == pl.num_programs(4) - 1

    @pl.when(step == 0)
    def start_row() -> None:
        before = operands["d_query"]
        query_sum[...] = jnp.zeros_like(query_sum) if before is None else before[...]

    @pl.when((member == 0) & (row == 0) & (step == 0))
    def start_keys() -> None:
        @functools.partial(jax.lax.fori_loop, 0, tiling.columns, init_val=None)
        def zero(at: Any, _: None) -> None:
            rows = pl.ds(at * tiling.block_k, tiling.block_k)
            key_sum[rows] = jnp.zeros((tiling.block_k, key_sum.shape[1]), key_sum.dtype)
            value_sum[rows] = jnp.zeros((tiling.block_k, value_sum.shape[1]), value_sum.dtype)

    def attend(masked: bool) -> None:
        for start in range(0, tiling.block_k, tiling.compute):
            part = slice(start, start + tiling.compute)
            place = pl.ds(pl.multiple_of(block * tiling.block_k + start, tiling.compute), tiling.compute)
            seen = None
            if masked:
                origin = (row * tiling.block_q, (tiling.part[0] + block) * tiling.block_k + start)
                seen = visible(tiling, origin, (tiling.compute, tiling.block_q), True, operands["ids"], part)
            gradients(tiling.rule, operands, part, seen, query_sum, key_sum.at[place], value_sum.at[place])

    if not tiling.unmasked:
        pl.when(kind == SOME)(lambda: attend(True))
    pl.when(kind == EVERYTHING)(lambda: attend(False))

    @pl.when(at_end)
    def end_row() -> None:
        d_query[...] = query_sum[...].astype(d_query.dtype)

    @pl.when(at_end & (member == pl.num_programs(2) - 1) & (row == tiling.rows - 1))
    def end_keys() -> None:
        @functools.partial(jax.lax.fori_loop, 0, tiling.columns, init_val=None)
        def write(at: Any, _: None) -> None:
            rows = pl.ds(at * tiling.block_k, tiling.block_k)
            d_key[rows] = key_sum[rows].astype(d_key.dtype)
            d_value[rows] = value_sum[rows].astype(d_value.dtype)


def gradients(
    rule: Rule, operands: dict[str, Any], part: slice, seen: Array | None, query_sum: Any, key_sum: Any, value_sum: Any
) -> None:
    """Add what a tile of scores (keys by queries) gives to the sums of its queries, keys and values."""
    query, d_out = operands["query"][...], operands["d_out"][...]
    key, value = operands["key"][part], operands["value"][part]
    scores, bent = base2(dot(key, query, (1, 1)), rule)
    if seen is not None:
        scores = jnp.where(seen, scores, MASKED)
    weights = jnp.exp2(scores - operands["lse"][...])
    value_sum[...] += dot(weights.astype(value.dtype), d_out, (1, 0))
    d_scores = weights * (dot(value, d_out, (1, 1)) - operands["delta"][...]) * rule.scale
    if bent is not None:
        d_scores *= 1 - bent * bent
    d_scores = d_scores.astype(query.dtype)
    key_sum[...] += dot(d_scores, query, (1, 0))
    query_sum[...] += dot(d_scores, key, (0, 0))
