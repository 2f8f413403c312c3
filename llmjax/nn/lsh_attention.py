"""Attention inside hash buckets: a token sees the tokens that a random rotation sends to the same side as itself."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from llmjax.nn.attention import store
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.query_blocks import by_queries
from llmjax.nn.scores import Scores, Tokens, dense, present, scores_of
from llmjax.nn.sites import site
from pallas_kernels.attention import attention, merge_partials

BLOCK = 64
"""Queries of the dense form at a time."""


@dataclass(frozen=True)
class LSHAttention(Mixer):
    """softmax(q k^T) v, k = q / |q|, over the union of rounds r of the last `reach` earlier tokens with the same h_r.

    h(x) = argmax [x R, -x R] with R `[head_dim, buckets / 2]` normal, fixed by the seed. A token sees itself only where
    it sees nothing else, which then is all it sees. Kitaev et al. 2020 (2001.04451). There chunks are cut from all
    sorted tokens, and where they fall depends on later tokens and on other documents; here the reach is counted in the
    bucket, so that neither has an influence. Each round costs O(length * reach).
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features a head; None is d_model / heads"""
    buckets: int = 64
    """values of a hash, an even number (the paper: 2 length / reach)"""
    reach: int = 64
    """earlier tokens of its bucket that a token sees in a round (the paper: chunks of 64)"""
    rounds: int = 4
    """independent hashes (the paper: 1 to 16)"""
    seed: int = 0
    """of the rotations"""
    form: Literal["sorted", "dense"] = "sorted"
    """blocks of sorted tokens, or a mask on all pairs; equal up to rounding. Cached tokens are masked"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return LSHAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes without meaning."""
        for name in ("heads", "reach", "rounds"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
        if self.buckets < 2 or self.buckets % 2:
            yield "buckets", "must be even and at least 2"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.head_dim is None and self.heads > 0 and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """An empty cache `[batch, length, heads, features]`: `query` and `value` of `dtype`, int32 `codes`."""
        shape = (batch, length, self.heads, self.head_dim or d_model // self.heads)
        codes = jnp.zeros((*shape[:3], self.rounds), jnp.int32)
        return {"query": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype), "codes": codes}

    def matmul_params(self, d_model: int) -> int:
        """Weights of the three projections."""
        return 3 * d_model * self.heads * (self.head_dim or d_model // self.heads)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Hashes, and in every round the 2 reach keys of a block for each of its queries; or all pairs once."""
        keys = (length + 1) / 2 if self.form == "dense" else self.rounds * min(2 * self.reach, length)
        return self.heads * (self.head_dim or d_model // self.heads) * (self.rounds * self.buckets + 4 * keys)


class LSHAttentionModule(nn.Module):
    """Owns `query` (which makes the keys too), `value`, `out`; sites q, v, z (heads' output)."""

    config: LSHAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, over the cached tokens too. Raises ValueError for a prefix."""
        c = self.config
        if context.prefix is not None:
            raise ValueError("LSHAttention cannot show a prefix: buckets hold earlier tokens only")
        head_dim = c.head_dim or self.d_model // c.heads
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "heads", "head_dim")
        q = site(self, "q", Linear((self.d_model,), (c.heads, head_dim), axes, kernel, name="query")(x))
        v = site(self, "v", Linear((self.d_model,), (c.heads, head_dim), axes, kernel, name="value")(x))
        shape = (c.heads, head_dim, c.rounds, c.buckets // 2)
        codes = hashes(q, jax.random.normal(jax.random.key(c.seed), shape))
        keys, values, key_codes = q, v, codes
        if state is not None and context.cache is not None:
            new, slot = {"query": q, "value": v, "codes": codes}, context.cache.slot
            state = {name: store(state[name], array, slot) for name, array in new.items()}
            keys, values, key_codes = state["query"].astype(q.dtype), state["value"].astype(q.dtype), state["codes"]
        if state is None and c.form == "sorted":
            z = by_sorting(q, v, codes, present(Tokens(context.positions), context.segment_ids), c.reach)
        else:
            scores = scores_of(q, unit(keys), values, replace(context, distance=None))
            z = by_mask(scores, codes, key_codes, v, c.reach)
        residual = self.initializer.residual(c.heads * head_dim, self.layers)
        inputs, axes = (c.heads, head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, name="out")(site(self, "z", z)), state


def hashes(
    x: Float[Array, "batch length heads head_dim"], rotations: Float[Array, "heads head_dim rounds planes"]
) -> Int[Array, "batch length heads rounds"]:
    """argmax [x R, -x R], in float32; whatever the length of x. Andoni et al. 2015 (1509.02897)."""
    turned = jnp.einsum("blhd,hdrp->blhrp", x.astype(jnp.float32), rotations)
    return jnp.argmax(jnp.concatenate([turned, -turned], axis=-1), axis=-1).astype(jnp.int32)


def unit(x: Float[Array, "... head_dim"]) -> Float[Array, "... head_dim"]:
    """x / |x|, by the mean square of its features and 1e-6 (the authors' code)."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-6) / math.sqrt(x.shape[-1])).astype(x.dtype)


def by_mask(
    scores: Scores,
    codes: Int[Array, "batch length heads rounds"],
    key_codes: Int[Array, "batch source heads rounds"],
    own: Float[Array, "batch length heads head_dim"],
    reach: int,
) -> Float[Array, "batch length heads head_dim"]:
    """All pairs of queries and keys, those of no common bucket or beyond the reach masked.

    `own` are the values of the queries' own tokens. Keys stand in the order of their positions.
    """

    def block(part: tuple[Array, Tokens, Array, Array]) -> Array:
        query, queries, codes, own = part
        some = replace(scores, query=query, queries=queries, aligned=False)
        earlier = dense(some) & (queries.positions[:, :, None] != scores.keys.positions[:, None, :])
        same = (codes[:, :, None] == key_codes[:, None]) & earlier[..., None, None]
        since = jnp.flip(jnp.cumsum(jnp.flip(same, 2), axis=2, dtype=jnp.int32), 2)
        seen = jnp.any(same & (since <= reach), axis=-1)
        out, lse = some.run(mask=jnp.moveaxis(seen, 3, 1), residual=True)
        return jnp.where(lse[..., None] > -jnp.inf, out, own)

    return by_queries(block, (scores.query, scores.queries, codes, own), BLOCK)


def by_sorting(
    query: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    codes: Int[Array, "batch length heads rounds"],
    ids: Int[Array, "batch length"],
    reach: int,
) -> Float[Array, "batch length heads head_dim"]:
    """Tokens sorted by document, bucket and position: what a block of `reach` may see is in it and the one before.

    `ids` are the documents, -1 for padding. Later tokens move keys inside blocks: they change the order in which a sum
    is taken, and nothing else.
    """
    batch, length, heads, _ = query.shape
    size = min(reach, length)
    plan = sort(codes, ids)

    def cut(x: Array) -> Array:
        x = jnp.take_along_axis(jnp.swapaxes(x, 1, 2)[:, :, None], plan.order[..., None], axis=3)
        return in_blocks(x, size)

    arrays = (cut(query), cut(unit(query)), cut(value), in_blocks(plan.group[..., None], size), cut(plan.stamp))
    results = attend(*arrays)

    def uncut(x: Array) -> Array:
        x = x.reshape(batch, heads, codes.shape[3], -1, x.shape[-1])
        return jnp.moveaxis(jnp.take_along_axis(x, plan.back[..., None], axis=3), (2, 3), (0, 2))

    out, lse = (uncut(x) for x in results)
    out, total = merge_partials(out, lse[..., 0])
    return jnp.where(total[..., None] > -jnp.inf, out, value)


class Plan(NamedTuple):
    """How rounds sort the tokens: where from, where to, groups of document and bucket in that order (0: absent).

    The stamps of two tokens of a document, one a round, differ by 1 to n < length where the second is in the first's
    bucket and up to n ranks ahead.
    """

    order: Int[Array, "batch heads rounds length"]
    back: Int[Array, "batch heads rounds length"]
    group: Int[Array, "batch heads rounds length"]
    stamp: Int[Array, "batch length heads rounds"]


def sort(codes: Int[Array, "batch length heads rounds"], ids: Int[Array, "batch length"]) -> Plan:
    """The tokens by document, then by code, then by position."""
    by_round = jnp.moveaxis(codes, 1, 3)
    ids = jnp.broadcast_to(ids[:, None, None], by_round.shape)
    order = jnp.lexsort((by_round, ids), axis=-1)
    back = jnp.argsort(order, axis=-1)
    ids, sorted_codes = (jnp.take_along_axis(x, order, axis=-1) for x in (ids, by_round))
    new = (jnp.diff(ids, axis=-1) != 0) | (jnp.diff(sorted_codes, axis=-1) != 0)
    new = jnp.pad(new, ((0, 0),) * 3 + ((1, 0),), constant_values=True)
    index = jnp.arange(codes.shape[1])
    rank = index - jax.lax.cummax(jnp.where(new, index, 0), axis=3)
    group = jnp.where(ids < 0, 0, jnp.cumsum(new, axis=-1, dtype=jnp.int32))
    stamp = codes * (2 * codes.shape[1]) + jnp.moveaxis(jnp.take_along_axis(rank, back, axis=-1), 3, 1)
    return Plan(order, back, group, stamp)


def in_blocks(x: Shaped[Array, "... length features"], size: int) -> Shaped[Array, "... blocks size features"]:
    """Blocks of `size`, the last filled up with zeros."""
    *lead, length, features = x.shape
    x = jnp.pad(x, (*((0, 0),) * len(lead), (0, -length % size), (0, 0)))
    return x.reshape(*lead, -1, size, features)


def attend(
    query: Float[Array, "*rounds blocks size head_dim"],
    key: Float[Array, "*rounds blocks size head_dim"],
    value: Float[Array, "*rounds blocks size head_dim"],
    group: Int[Array, "*rounds blocks size 1"],
    stamp: Int[Array, "*rounds blocks size rounds"],
) -> tuple[Float[Array, "*rounds blocks size head_dim"], Float[Array, "*rounds blocks size 1"]]:
    """Attention of sorted tokens to the `size` before them in their group, and the log-sum-exp.

    The score of a pair that n rounds meet is less by log n in each, so that their sum counts it once.
    """
    size = query.shape[-2]

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[-2:])

    def reachable(x: Array) -> Array:
        before = jnp.pad(x, (*((0, 0),) * (x.ndim - 3), (1, 0), (0, 0), (0, 0)))[..., :-1, :, :]
        return flat(jnp.concatenate([before, x], axis=-2))

    ahead = jnp.arange(size)[:, None] - jnp.arange(-size, size)
    mine, others = flat(group), jnp.swapaxes(reachable(group), 1, 2)
    seen = (mine == others) & (mine > 0) & (ahead > 0) & (ahead <= size)
    apart = flat(stamp)[:, :, None] - reachable(stamp)[:, None]
    meetings = jnp.sum((apart > 0) & (apart <= size), axis=-1)
    bias = -jnp.log(jnp.maximum(meetings, 1).astype(jnp.float32))
    q, k, v = (x[:, :, None] for x in (flat(query), reachable(key), reachable(value)))
    # Blocks are no axis that a mesh splits, and GSPMD cannot split other kernels.
    options: dict[str, Any] = dict(scale=1.0, return_residual=True, implementation="xla")
    out, lse = attention(q, k, v, bias[:, None], seen[:, None], **options)
    return out.reshape(query.shape), lse.reshape(*query.shape[:-1], 1)
