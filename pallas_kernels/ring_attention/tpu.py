"""What a shard of queries does with a shard of keys on TPU: the attention kernels, begun where the last hop ended.

The softmax is carried into the kernel and out of it, in place and not normalised: after the kernel there is nothing to
merge, which the transfer of the next keys would be hidden behind instead. Maxima are in base 2. Gradients of queries
are carried through the backward kernel alike. Positions decide what is seen, by a table of blocks made on the device.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention import tpu
from pallas_kernels.attention.mask import Rule, Seen
from pallas_kernels.attention.tpu import Config, online
from pallas_kernels.attention.tpu_backward import backward_part
from pallas_kernels.attention.tpu_blocks import (
    EVERYTHING,
    LANES,
    LOG2E,
    MASKED,
    SOME,
    VMEM_BYTES,
    Tiling,
    base2,
    cost,
    dot,
    fit,
    heads_first,
    id_rows,
    presence,
    tile,
    visible,
    visits,
)


class State(NamedTuple):
    """The running softmax of every query, float32 or wider; lengths are those of whole blocks."""

    top: Float[Array, "batch heads 1 length"]
    total: Float[Array, "batch heads 1 length"]
    out: Float[Array, "batch heads length value_dim"]


def refusal(query: Array, key: Array, value: Array, rule: Rule, seen: Seen, sinks: Array | None) -> str | None:
    """What the attention kernels refuse, with positions."""
    if seen.positions is None:
        indices = (jnp.zeros((1, query.shape[1]), jnp.int32), jnp.zeros((1, key.shape[1]), jnp.int32))
        seen = Seen(indices, seen.segments)
    return tpu.refusal(query, key, value, rule, seen, sinks)


def heuristic(query: Array, key: Array, value: Array, rule: Rule, parts: int) -> Config:
    """The attention kernels' blocks, none larger than one of a shard's `parts`; one size for both passes."""
    found = tpu.heuristic(query.shape, key.shape, value.shape, query.dtype, rule)
    part = query.shape[1] // parts
    block_q, block_k = (max(min(block, part), LANES) for block in (found.block_q, found.block_k))
    compute = min(found.compute, block_k)
    return Config(block_q, block_k, compute, block_q, block_k, compute, found.resident)


# ---- arrays as the kernels take them ---------------------------------------------------------------------------------


class Hop(Tiling):
    """The tiling of a hop, of which it is not known which shards meet."""

    def pairs(self) -> int:
        """The mean over all hops, near enough: under a causal mask half of all pairs."""
        return super().pairs() // (2 if self.rule.causal else 1)


def tiling_of(seen: Seen, rule: Rule, config: Config) -> Tiling:
    """The tiling of both passes."""
    assert seen.positions is not None
    query, key = (x.shape[1] for x in seen.positions)
    return Hop(**vars(tile((query, key), seen, rule, config.block_q, config.block_k, config.compute)))


def travelling(key: Array, value: Array, seen: Seen, config: Config) -> tuple[Array, Array]:
    """The keys and values as they travel."""
    block = fit(config.block_k, key.shape[1], min(config.compute, fit(config.block_k, key.shape[1])))
    there = presence(seen)[1]
    return heads_first(key, there, block), heads_first(value, there, block)


def begin(
    query: Array, key: Array, value: Array, sinks: Array | None, seen: Seen, config: Config
) -> tuple[Array, State]:
    """The queries in blocks, and the softmax before any key; a sink is a score that is there from the start."""
    x = heads_first(query, presence(seen)[0], fit(config.block_q, query.shape[1]))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    batch, heads, length, _ = x.shape
    rows = (batch, heads, 1, length)
    out = jnp.zeros((batch, heads, length, value.shape[3]), wide)
    if sinks is None:
        return x, State(jnp.full(rows, MASKED, wide), jnp.zeros(rows, wide), out)
    top = jnp.broadcast_to((sinks.astype(wide) * LOG2E)[None, :, None, None], rows)
    return x, State(top, jnp.ones(rows, wide), out)


def finish(state: State, length: int) -> tuple[Array, Array]:
    """Output and log-sum-exp, [batch, length, heads, ...]; a query without keys gives 0 and -inf."""
    top, total = state.top[:, :, 0], state.total[:, :, 0]
    # A maximum may pass over NaN, a sum does not: such rows are not empty.
    empty = (top <= 0.5 * MASKED) & (total == total)
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top / LOG2E + jnp.log(total))
    out = jnp.where(empty[..., None], 0.0, state.out / total[..., None])
    return jnp.swapaxes(out, 1, 2)[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]


def begin_gradients(
    query: Array, key: Array, lse: Array, delta: Array, d_out: Array, seen: Seen, config: Config
) -> tuple[dict[str, Array], Array]:
    """The queries and what belongs to them in blocks, and their gradient before any key."""
    block, there = fit(config.block_q, query.shape[1]), presence(seen)[0]
    q = heads_first(query, there, block)
    pad = ((0, 0), (0, 0), (0, q.shape[2] - query.shape[1]))
    # A row without keys, or one that is padding, gets weight exp2(score - inf) = 0.
    base = jnp.swapaxes(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), 1, 2)
    rows = {
        "query": q,
        "d_out": heads_first(d_out.astype(query.dtype), there, block),
        "lse": jnp.pad(base, pad, constant_values=jnp.inf)[:, :, None],
        "delta": jnp.pad(jnp.swapaxes(delta, 1, 2), pad)[:, :, None],
    }
    return rows, jnp.zeros_like(q, lse.dtype)


def finish_gradients(
    d_query: Array, d_keys: tuple[Array, Array], query: Array, key: Array
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value, [batch, length, heads, dim]."""
    d_query, d_key, d_value = (jnp.swapaxes(x, 1, 2) for x in (d_query, *d_keys))
    return d_query[:, : query.shape[1]], d_key[:, : key.shape[1]], d_value[:, : key.shape[1]]


# ---- one hop ---------------------------------------------------------------------------------------------------------


def attend(queries: Array, keys: tuple[Array, Array], seen: Seen, state: State, rule: Rule, config: Config) -> State:
    """The softmax carried on over the keys at hand; where nobody sees any of them, no kernel runs."""
    tiling = tiling_of(seen, rule, config)
    table, steps = visits(tiling, seen)
    ids = id_rows(tiling, seen)
    batch, heads, _, head_dim = queries.shape
    specs, query_at = tpu.blocks(tiling, heads // keys[0].shape[1], (head_dim, keys[1].shape[3]), ids, None)
    row = pl.BlockSpec((None, None, 1, tiling.block_q), lambda b, n, i, s, table: (b, n, 0, i))
    by_query = pl.BlockSpec((None, None, tiling.block_q, keys[1].shape[3]), query_at)
    state_specs: list[Any] = [row, row, by_query]
    specs["state"] = State(*state_specs)
    order: Any = ("parallel", "parallel", "parallel" if batch * heads == 1 else "arbitrary", "arbitrary")

    def work(state: State) -> State:
        operands = {"query": queries, "key": keys[0], "value": keys[1], "ids": ids, "sinks": None, "state": state}
        leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path((table, operands))]
        places = [i for i, path in enumerate(leaves) if jax.tree_util.DictKey("state") in path]
        widths = (LANES, LANES, state.out.shape[3])
        results = pl.pallas_call(
            functools.partial(kernel, tiling),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, heads, tiling.rows, steps),
                in_specs=[specs],
                out_specs=state_specs,
                scratch_shapes=[pltpu.VMEM((tiling.block_q, width), state.out.dtype) for width in widths],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state],
            compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES),
            cost_estimate=cost(tiling, batch * heads, 2 * sum(x.shape[3] for x in keys), (queries, *keys, *state)),
            input_output_aliases=dict(zip(places, range(3), strict=True)),
            name="ring_attention_forward",
        )(table, operands)
        return State(*results)

    assert table is not None
    return jax.lax.cond(jnp.any(table & 3 > 0), work, lambda state: state, state)


def kernel(
    tiling: Tiling,
    table: Any,
    operands: dict[str, Any],
    top_out: Any,
    total_out: Any,
    out: Any,
    top: Any,
    total: Any,
    weighted: Any,
) -> None:
    """One block of scores. `top`, `total` (spread over the lanes) and `weighted` are the state of the rows at work."""
    batch, _, row, step = (pl.program_id(axis) for axis in range(4))
    block, kind = tiling.locate(batch, row, step, table)

    @pl.when(step == 0)
    def start_row() -> None:
        state = operands["state"]
        top[...] = by_lanes(state.top[...])
        total[...] = by_lanes(state.total[...]) / LANES
        weighted[...] = state.out[...]

    def work(masked: bool) -> None:
        for start in range(0, tiling.block_k, tiling.compute):
            part = slice(start, start + tiling.compute)
            scores, _ = base2(dot(operands["query"][...], operands["key"][part], (1, 1)), tiling.rule)
            if masked:
                origin = (row * tiling.block_q, block * tiling.block_k + start)
                scores = jnp.where(visible(tiling, origin, scores.shape, False, operands["ids"], part), scores, MASKED)
            online(scores, operands["value"][part], top, total, weighted)

    pl.when(kind == SOME)(lambda: work(True))
    pl.when(kind == EVERYTHING)(lambda: work(False))

    @pl.when(step == pl.num_programs(3) - 1)
    def end_row() -> None:
        top_out[...] = top[...].T[:1]
        total_out[...] = jnp.sum(total[...].T, axis=0, keepdims=True)
        out[...] = weighted[...]


def by_lanes(row: Float[Array, "1 rows"]) -> Float[Array, "rows 128"]:
    """A row of numbers as a column, in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def gradients(
    rows: dict[str, Array], keys: tuple[Array, Array], seen: Seen, d_query: Array, rule: Rule, config: Config
) -> tuple[Array, tuple[Array, Array]]:
    """`d_query` carried on over the keys at hand, float32, and the gradients of these keys and values.

    The kernel sums the latter in float32 and gives them in the keys' dtype; over the hops they are summed in float32.
    """
    tiling = tiling_of(seen, rule, config)
    table, _ = visits(tiling, seen)
    turn = max(config.resident // tiling.block_k, 1)

    def work(d_query: Array) -> tuple[Array, tuple[Array, Array]]:
        operands = {**rows, "key": keys[0], "value": keys[1], "ids": id_rows(tiling, seen)}
        parts = []
        for start in range(0, tiling.columns, turn):
            part = dataclasses.replace(tiling, part=(start, min(start + turn, tiling.columns)))
            d_query, *found = backward_part(part, {**operands, "d_query": d_query}, seen, False)
            parts.append(found)
        d_key, d_value = (jnp.concatenate(found, axis=2).astype(d_query.dtype) for found in zip(*parts))
        return d_query, (d_key, d_value)

    def skip(d_query: Array) -> tuple[Array, tuple[Array, Array]]:
        d_key, d_value = (jnp.zeros_like(x, d_query.dtype) for x in keys)
        return d_query, (d_key, d_value)

    assert table is not None
    return jax.lax.cond(jnp.any(table & 3 > 0), work, skip, d_query)
