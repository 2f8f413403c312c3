"""Attention by tiles of scores in plain XLA: online softmax forward, recomputed tiles backward, unseen tiles skipped.

Milakov and Gimelshein 2018 (1805.02867), Rabe and Staats 2021 (2112.05682), Dao 2023 (2307.08691). Inside, queries are
[batch, kv_heads, groups, block_q, head_dim] and keys [batch, kv_heads, block_k, head_dim].
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.mask import ABSENT_KEY, ABSENT_QUERY, Rule, Seen, allowed, block_map, ends, first_last
from pallas_kernels.attention.reference import by_group
from pallas_kernels.attention.vjp import Operands, Visible


@dataclass(frozen=True)
class Config:
    """Queries and keys in a tile of scores."""

    block_q: int = 512
    block_k: int = 512


class Rows(NamedTuple):
    """One side of the scores, cut into blocks along the first axis."""

    x: Float[Array, "blocks ..."]
    positions: Int[Array, "blocks batch block"]
    segments: Int[Array, "blocks batch block"]


class Tiles(NamedTuple):
    """The arrays of a call, padded to whole blocks (padding is absent), and the key blocks of each block of queries."""

    queries: Rows
    keys: Rows
    values: Float[Array, "key_blocks batch kv_heads block_k value_dim"]
    bias: Float[Array, "#batch #heads #query_length #key_length"] | None
    dense: Bool[Array, "#batch #heads #query_length #key_length"] | None
    start: Int[Array, " query_blocks"]
    stop: Int[Array, " query_blocks"]


def prepare(operands: Operands, visible: Visible, rule: Rule, config: Config) -> Tiles:
    """Cut the arrays of one call into blocks."""
    query, key, value, bias, _ = operands
    lengths = (query.shape[1], key.shape[1])
    positions, segments = ends(visible.seen, lengths)
    assert positions is not None
    segments = segments or (jnp.zeros((1, lengths[0]), jnp.int32), jnp.zeros((1, lengths[1]), jnp.int32))
    blocks = block_map(visible.seen, rule, *lengths, config.block_q, config.block_k).max(0, keepdims=True)
    start, stop = first_last(blocks)
    q = cut(query, config.block_q)
    q = q.reshape(*q.shape[:3], key.shape[2], query.shape[2] // key.shape[2], q.shape[4])
    k, v = (cut(x, config.block_k).transpose(0, 1, 3, 2, 4) for x in (key, value))
    sides = [
        Rows(x, cut(positions[side], size), cut(segments[side], size, absent))
        for side, x, size, absent in (
            (0, q.transpose(0, 1, 3, 4, 2, 5), config.block_q, ABSENT_QUERY),
            (1, k, config.block_k, ABSENT_KEY),
        )
    ]
    grid = tuple(-n % size for n, size in zip(lengths, (config.block_q, config.block_k)))
    bias, dense = (None if x is None else pad_scores(x, grid) for x in (bias, visible.dense))
    return Tiles(sides[0], sides[1], v, bias, dense, start[0], stop[0])


def cut(x: Array, block: int, constant: int = 0) -> Array:
    """[batch, length, ...] -> [blocks, batch, block, ...]."""
    pad = [(0, -x.shape[1] % block if axis == 1 else 0) for axis in range(x.ndim)]
    x = jnp.pad(x, pad, constant_values=constant)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def pad_scores(x: Array, grid: tuple[int, ...]) -> Array:
    """Append to the last two axes, those that are not broadcast."""
    return jnp.pad(x, [(0, 0), (0, 0)] + [(0, n if size > 1 else 0) for n, size in zip(grid, x.shape[2:])])


def corner(x: Array, i: Array, j: Array, config: Config) -> tuple[Array | int, ...]:
    """Where tile (i, j) begins in an array that broadcasts to [batch, heads, query_length, key_length]."""
    return 0, 0, i * config.block_q if x.shape[2] > 1 else 0, j * config.block_k if x.shape[3] > 1 else 0


def tile(x: Array, i: Array, j: Array, config: Config, groups: int) -> Array:
    """Tile (i, j) of such an array, [batch|1, kv_heads|1, groups|1, block_q|1, block_k|1]."""
    size = (*x.shape[:2], min(x.shape[2], config.block_q), min(x.shape[3], config.block_k))
    return by_group(jax.lax.dynamic_slice(x, corner(x, i, j, config), size), groups)


def score(tiles: Tiles, i: Array, j: Array, rule: Rule, config: Config) -> tuple[Array, Array]:
    """Scores of tile (i, j), -inf where unseen, and the derivative of the cap (1 where there is none)."""
    q, k = tiles.queries.x[i], tiles.keys.x[j]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=wide) * rule.scale
    slope = jnp.ones((), wide)
    if rule.soft_cap is not None:
        bent = jnp.tanh(s / rule.soft_cap)
        s, slope = rule.soft_cap * bent, 1 - jnp.square(bent)
    if tiles.bias is not None:
        s = s + tile(tiles.bias, i, j, config, q.shape[2]).astype(wide)
    sides = (tiles.queries, i), (tiles.keys, j)
    positions, segments = (tuple(getattr(side, name)[n] for side, n in sides) for name in ("positions", "segments"))
    mask = allowed(rule, Seen((positions[0], positions[1]), (segments[0], segments[1])))[:, None, None]
    if tiles.dense is not None:
        mask = mask & tile(tiles.dense, i, j, config, q.shape[2])
    return jnp.where(mask, s, -jnp.inf), slope


def tiled_forward(
    operands: Operands, visible: Visible, rule: Rule, config: Config
) -> tuple[Float[Array, "batch query_length heads value_dim"], Float[Array, "batch heads query_length"]]:
    """Output in value's dtype and log-sum-exp; scores of one tile a head exist at a time."""
    tiles = prepare(operands, visible, rule, config)
    batch, length, heads, _ = operands.query.shape
    wide = jnp.promote_types(operands.query.dtype, jnp.float32)
    rows = tiles.queries.x.shape[1:5]

    def block(i: Array) -> tuple[Array, Array]:
        def visit(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            s, _ = score(tiles, i, j, rule, config)
            new = jnp.maximum(top, s.max(-1))
            base = jnp.where(new > -jnp.inf, new, 0.0)
            p = jnp.exp(s - base[..., None])
            keep = jnp.exp(top - base)
            v = tiles.values[j]
            more = jnp.einsum("bkgqs,bksd->bkgqd", p.astype(v.dtype), v, preferred_element_type=wide)
            return new, keep * total + p.sum(-1), keep[..., None] * out + more

        top, total = jnp.full(rows, -jnp.inf, wide), jnp.zeros(rows, wide)
        if operands.sinks is not None:
            top = jnp.broadcast_to(operands.sinks.astype(wide).reshape(1, rows[1], rows[2], 1), rows)
            total = jnp.ones(rows, wide)
        out = jnp.zeros((*rows, operands.value.shape[3]), wide)
        top, total, out = jax.lax.fori_loop(tiles.start[i], tiles.stop[i], visit, (top, total, out))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
        return (out / total[..., None]).astype(operands.value.dtype), lse

    out, lse = jax.lax.map(block, jnp.arange(tiles.start.shape[0]))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, out.shape[-1])
    return out[:, :length], lse.transpose(1, 2, 3, 0, 4).reshape(batch, heads, -1)[..., :length]


def tiled_backward(
    operands: Operands,
    visible: Visible,
    lse: Float[Array, "batch heads query_length"],
    delta: Float[Array, "batch heads query_length"],
    d_out: Float[Array, "batch query_length heads value_dim"],
    rule: Rule,
    config: Config,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of query, key, value and bias, summed in float32 tile by tile."""
    tiles = prepare(operands, visible, rule, config)
    query, key, value = operands.query, operands.key, operands.value
    wide = jnp.promote_types(query.dtype, jnp.float32)
    shape = tiles.queries.x.shape
    d_outs = cut(d_out, config.block_q).reshape(*shape[:2], shape[4], *shape[2:4], -1).transpose(0, 1, 3, 4, 2, 5)
    base, deltas = (
        cut(x.transpose(0, 2, 1), config.block_q).transpose(0, 1, 3, 2).reshape(shape[:5])
        for x in (jnp.where(lse > -jnp.inf, lse, 0.0), delta)
    )

    def block(carry: tuple[Array, Array, Array | None], i: Array) -> tuple[tuple[Array, Array, Array | None], Array]:
        q, d = tiles.queries.x[i], d_outs[i]

        def visit(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            d_query, d_keys, d_values, d_bias = carry
            k, v = tiles.keys.x[j], tiles.values[j]
            s, slope = score(tiles, i, j, rule, config)
            p = jnp.exp(s - base[i][..., None])
            d_p = jnp.einsum("bkgqd,bksd->bkgqs", d, v, preferred_element_type=wide)
            d_s = p * (d_p - deltas[i][..., None])
            if d_bias is not None:
                d_bias = add_tile(d_bias, d_s, corner(d_bias, i, j, config))
            d_s = (d_s * slope * rule.scale).astype(q.dtype)
            d_query += jnp.einsum("bkgqs,bksd->bkgqd", d_s, k, preferred_element_type=wide)
            d_k = jnp.einsum("bkgqs,bkgqd->bksd", d_s, q, preferred_element_type=wide)
            d_v = jnp.einsum("bkgqs,bkgqd->bksd", p.astype(d.dtype), d, preferred_element_type=wide)
            return d_query, d_keys.at[j].add(d_k), d_values.at[j].add(d_v), d_bias

        start = (jnp.zeros(shape[1:], wide), *carry)
        d_query, d_k, d_v, d_b = jax.lax.fori_loop(tiles.start[i], tiles.stop[i], visit, start)
        return (d_k, d_v, d_b), d_query.astype(query.dtype)

    d_bias = None if tiles.bias is None else jnp.zeros(tiles.bias.shape, wide)
    zeros = (jnp.zeros(tiles.keys.x.shape, wide), jnp.zeros(tiles.values.shape, wide), d_bias)
    (d_k, d_v, d_bias), d_q = jax.lax.scan(block, zeros, jnp.arange(shape[0]))
    d_query = d_q.transpose(1, 0, 4, 2, 3, 5).reshape(query.shape[0], -1, *query.shape[2:])[:, : query.shape[1]]
    d_key, d_value = (
        d.transpose(1, 0, 3, 2, 4).reshape(x.shape[0], -1, *x.shape[2:])[:, : x.shape[1]].astype(x.dtype)
        for d, x in ((d_k, key), (d_v, value))
    )
    if d_bias is not None and operands.bias is not None:
        rows, columns = operands.bias.shape[2:]
        d_bias = d_bias[:, :, :rows, :columns].astype(operands.bias.dtype)
    return d_query, d_key, d_value, d_bias


def add_tile(total: Array, part: Array, at: tuple[Array | int, ...]) -> Array:
    """Add a tile's gradient to that of an array that broadcasts to [batch, heads, query_length, key_length]."""
    part = part.reshape(part.shape[0], -1, *part.shape[3:])
    part = part.sum([a for a in range(4) if total.shape[a] == 1], keepdims=True)
    here = jax.lax.dynamic_slice(total, at, part.shape)
    return jax.lax.dynamic_update_slice(total, here + part, at)


def column_sums(
    operands: Operands, visible: Visible, lse: Float[Array, "batch heads query_length"], rule: Rule, config: Config
) -> Float[Array, "batch heads key_length"]:
    """sum_i P_ij for every key j: the attention mass that a key receives (Zhang et al. 2023, 2306.14048), float32.

    One more pass over the tiles from the log-sum-exp of any implementation; no gradient flows through it.
    """
    tiles = prepare(operands, visible, rule, config)
    shape = tiles.queries.x.shape
    base = jnp.where(lse > -jnp.inf, lse, 0.0).transpose(0, 2, 1)
    base = cut(base, config.block_q).transpose(0, 1, 3, 2).reshape(shape[:5])

    def block(total: Array, i: Array) -> tuple[Array, None]:
        def visit(j: Array, total: Array) -> Array:
            s, _ = score(tiles, i, j, rule, config)
            return total.at[j].add(jnp.exp(s - base[i][..., None]).sum(-2))

        return jax.lax.fori_loop(tiles.start[i], tiles.stop[i], visit, total), None

    total = jnp.zeros((tiles.keys.x.shape[0], *shape[1:4], config.block_k), base.dtype)
    total, _ = jax.lax.scan(block, total, jnp.arange(shape[0]))
    sums = total.transpose(1, 2, 3, 0, 4).reshape(shape[1], shape[2] * shape[3], -1)
    return jax.lax.stop_gradient(sums[..., : operands.key.shape[1]])
