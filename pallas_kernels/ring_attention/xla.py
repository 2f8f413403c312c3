"""What a shard of queries does with a shard of keys in plain XLA: the softmax carried on, and its gradient, by tiles.

With q_i the queries, k_j and v_j the keys and values at hand, s_ij = cap(scale q_i.k_j) and (m, l, o) what is carried,

    m' = max(m, max_j s_ij),  l' = e^(m - m') l + sum_j e^(s_ij - m'),  o' = e^(m - m') o + sum_j e^(s_ij - m') v_j

in float32; o / l is the attention over all keys so far (Milakov and Gimelshein 2018, 1805.02867; Liu et al. 2023,
2310.01889). Queries are [query_blocks, batch, kv_heads, groups, block_q, head_dim]; a key and its value travel as one
vector, in tiles [key_blocks, batch, kv_heads, block_k, head_dim + value_dim].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.mask import ABSENT_KEY, ABSENT_QUERY, Rule, Seen, allowed, block_map, first_last
from pallas_kernels.attention.tiled import Config, cut

BLOCK = 512
"""Queries and keys of a tile, at most."""


class State(NamedTuple):
    """The running softmax of every query, float32 or wider."""

    top: Float[Array, "query_blocks batch kv_heads groups block_q"]
    total: Float[Array, "query_blocks batch kv_heads groups block_q"]
    out: Float[Array, "query_blocks batch kv_heads groups block_q value_dim"]


class Rows(NamedTuple):
    """What the gradient needs of every query: log-sum-exp (0 where nothing is seen), delta, and d_out."""

    query: Float[Array, "query_blocks batch kv_heads groups block_q head_dim"]
    lse: Float[Array, "query_blocks batch kv_heads groups block_q"]
    delta: Float[Array, "query_blocks batch kv_heads groups block_q"]
    d_out: Float[Array, "query_blocks batch kv_heads groups block_q value_dim"]


class Marks(NamedTuple):
    """Positions and segments in blocks, and the blocks of keys that each block of queries visits: start to stop - 1."""

    positions: tuple[Int[Array, "query_blocks batch block_q"], Int[Array, "key_blocks batch block_k"]]
    segments: tuple[Int[Array, "query_blocks batch block_q"], Int[Array, "key_blocks batch block_k"]]
    start: Int[Array, " query_blocks"]
    stop: Int[Array, " query_blocks"]

    def at(self, where: Array, ids: Array, j: Array) -> Seen:
        """Those of a block of queries and of block j of the keys."""
        return Seen((where, self.positions[1][j]), (ids, self.segments[1][j]))


def refusal(query: Array, key: Array, value: Array, rule: Rule, seen: Seen, sinks: Array | None) -> str | None:
    """Nothing."""
    return None


def heuristic(query: Array, key: Array, value: Array, rule: Rule, parts: int) -> Config:
    """Tiles as large as may be that cut each of a shard's `parts` into equal ones, if they can."""
    length = query.shape[1] // parts
    block = -(-length // -(-length // BLOCK))
    return Config(block, block)


# ---- arrays in blocks ------------------------------------------------------------------------------------------------


def travelling(key: Array, value: Array, seen: Seen, config: Config) -> Array:
    """The keys and values as they travel."""
    return cut(jnp.concatenate([key, value], axis=-1), config.block_k).transpose(0, 1, 3, 2, 4)


def begin(
    query: Array, key: Array, value: Array, sinks: Array | None, seen: Seen, config: Config
) -> tuple[Array, State]:
    """The queries in blocks, and the softmax before any key; a sink is a score that is there from the start."""
    x = by_block(query, config.block_q, key.shape[2])
    wide = jnp.promote_types(query.dtype, jnp.float32)
    rows = x.shape[:5]
    out = jnp.zeros((*rows, value.shape[3]), wide)
    if sinks is None:
        return x, State(jnp.full(rows, -jnp.inf, wide), jnp.zeros(rows, wide), out)
    top = jnp.broadcast_to(sinks.astype(wide).reshape(rows[2], rows[3], 1), rows)
    return x, State(top, jnp.ones(rows, wide), out)


def finish(state: State, length: int) -> tuple[Array, Array]:
    """Output and log-sum-exp, [batch, length, heads, ...]; a query without keys gives 0 and -inf."""
    some = state.total > 0
    total = jnp.where(some, state.total, 1.0)
    lse = jnp.where(some, state.top + jnp.log(total), -jnp.inf)
    return by_length(state.out / total[..., None], length), by_length(lse[..., None], length)[..., 0]


def begin_gradients(
    query: Array, key: Array, lse: Array, delta: Array, d_out: Array, seen: Seen, config: Config
) -> tuple[Rows, Array]:
    """The queries and what belongs to them in blocks, and their gradient before any key."""
    base = jnp.where(lse > -jnp.inf, lse, 0.0)
    arrays = (query, base[..., None], delta[..., None], d_out)
    q, base, delta, d_out = (by_block(x, config.block_q, key.shape[2]) for x in arrays)
    return Rows(q, base[..., 0], delta[..., 0], d_out), jnp.zeros_like(q, lse.dtype)


def finish_gradients(d_query: Array, d_keys: Array, query: Array, key: Array) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value, [batch, length, heads, dim]."""
    d_keys = d_keys.transpose(1, 0, 3, 2, 4).reshape(key.shape[0], -1, key.shape[2], d_keys.shape[-1])
    d_key, d_value = jnp.split(d_keys[:, : key.shape[1]], [key.shape[3]], axis=-1)
    return by_length(d_query, query.shape[1]), d_key, d_value


def by_block(x: Float[Array, "batch length heads dim"], block: int, kv_heads: int) -> Array:
    """[batch, length, heads, dim] -> [blocks, batch, kv_heads, groups, block, dim]."""
    x = cut(x, block)
    return x.reshape(*x.shape[:3], kv_heads, -1, x.shape[4]).transpose(0, 1, 3, 4, 2, 5)


def by_length(x: Array, length: int) -> Float[Array, "batch length heads dim"]:
    """The inverse of `by_block`."""
    blocks, batch, kv_heads, groups, block, dim = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * block, kv_heads * groups, dim)[:, :length]


def marks_of(seen: Seen, rule: Rule, config: Config) -> Marks:
    """Positions and segments in blocks, and which blocks see which."""
    assert seen.positions is not None
    lengths = [x.shape[1] for x in seen.positions]
    blocks = block_map(seen, rule, lengths[0], lengths[1], config.block_q, config.block_k).max(0, keepdims=True)
    start, stop = first_last(blocks)
    ids = seen.segments or (jnp.zeros((1, lengths[0]), jnp.int32), jnp.zeros((1, lengths[1]), jnp.int32))
    positions = cut(seen.positions[0], config.block_q), cut(seen.positions[1], config.block_k)
    segments = cut(ids[0], config.block_q, ABSENT_QUERY), cut(ids[1], config.block_k, ABSENT_KEY)
    return Marks(positions, segments, start[0], stop[0])


# ---- one hop ---------------------------------------------------------------------------------------------------------


def score(
    q: Float[Array, "batch kv_heads groups block_q head_dim"],
    k: Float[Array, "batch kv_heads block_k head_dim"],
    tokens: Seen,
    rule: Rule,
) -> tuple[Float[Array, "batch kv_heads groups block_q block_k"], Float[Array, "..."]]:
    """Scores of a tile, -inf where unseen, and the derivative of the cap (1 where there is none)."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=wide) * rule.scale
    slope = jnp.ones((), wide)
    if rule.soft_cap is not None:
        bent = jnp.tanh(s / rule.soft_cap)
        s, slope = rule.soft_cap * bent, 1 - jnp.square(bent)
    return jnp.where(allowed(rule, tokens)[:, None, None], s, -jnp.inf), slope


def attend(queries: Array, keys: Array, seen: Seen, state: State, rule: Rule, config: Config) -> State:
    """The softmax carried on over the keys at hand; where nobody sees any of them, nothing is done."""
    marks = marks_of(seen, rule, config)

    def block(_: None, row: tuple[Any, ...]) -> tuple[None, State]:
        q, where, ids, first, last, state = row

        def visit(j: Array, state: State) -> State:
            k, v = jnp.split(keys[j], [q.shape[-1]], axis=-1)
            s, _ = score(q, k, marks.at(where, ids, j), rule)
            top = jnp.maximum(state.top, s.max(-1))
            base = jnp.where(top > -jnp.inf, top, 0.0)
            p, keep = jnp.exp(s - base[..., None]), jnp.exp(state.top - base)
            more = jnp.einsum("bkgqs,bksd->bkgqd", p.astype(v.dtype), v, preferred_element_type=s.dtype)
            return State(top, keep * state.total + p.sum(-1), keep[..., None] * state.out + more)

        return None, jax.lax.fori_loop(first, last, visit, state)

    def work(state: State) -> State:
        rows = (queries, marks.positions[0], marks.segments[0], marks.start, marks.stop, state)
        return jax.lax.scan(block, None, rows)[1]

    return jax.lax.cond(jnp.any(marks.stop > marks.start), work, lambda state: state, state)


def gradients(rows: Rows, keys: Array, seen: Seen, d_query: Array, rule: Rule, config: Config) -> tuple[Array, Array]:
    """`d_query` carried on over the keys at hand, and the gradient of these keys and values; float32 or wider.

    With P_ij = exp(s_ij - lse_i), dS_ij = P_ij (d_out_i . v_j - delta_i) (Dao et al. 2022, 2205.14135).
    """
    marks = marks_of(seen, rule, config)
    wide = d_query.dtype

    def block(d_keys: Array, row: tuple[Any, ...]) -> tuple[Array, Array]:
        (q, lse, delta, d_out), where, ids, first, last, d_query = row

        def visit(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_query, d_keys = carry
            k, v = jnp.split(keys[j], [q.shape[-1]], axis=-1)
            s, slope = score(q, k, marks.at(where, ids, j), rule)
            p = jnp.exp(s - lse[..., None])
            d_p = jnp.einsum("bkgqd,bksd->bkgqs", d_out, v, preferred_element_type=wide)
            d_s = (p * (d_p - delta[..., None]) * slope * rule.scale).astype(q.dtype)
            d_query += jnp.einsum("bkgqs,bksd->bkgqd", d_s, k, preferred_element_type=wide)
            d_k = jnp.einsum("bkgqs,bkgqd->bksd", d_s, q, preferred_element_type=wide)
            d_v = jnp.einsum("bkgqs,bkgqd->bksd", p.astype(d_out.dtype), d_out, preferred_element_type=wide)
            return d_query, d_keys.at[j].add(jnp.concatenate([d_k, d_v], axis=-1))

        d_query, d_keys = jax.lax.fori_loop(first, last, visit, (d_query, d_keys))
        return d_keys, d_query

    def work(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_query, d_keys = carry
        by_row = (rows, marks.positions[0], marks.segments[0], marks.start, marks.stop, d_query)
        d_keys, d_query = jax.lax.scan(block, d_keys, by_row)
        return d_query, d_keys

    carry = (d_query, jnp.zeros_like(keys, wide))
    return jax.lax.cond(jnp.any(marks.stop > marks.start), work, lambda carry: carry, carry)
