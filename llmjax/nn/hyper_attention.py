"""HyperAttention: the large entries of the attention matrix by sorted hashes, the rest estimated from sampled keys."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.lsh_attention import in_blocks
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scores import Tokens, present
from llmjax.nn.sites import site
from pallas_kernels.attention import attention, merge_partials


@dataclass(frozen=True)
class HyperAttention(Mixer):
    """sum_j a_ij exp(s_ij) v_j / sum_j a_ij exp(s_ij), s = q k^T / sqrt(head_dim), a an estimate of all ones.

    Queries and keys of a document are each sorted by hash and cut into blocks of `block`; a is 1 where the two stand in
    blocks of the same number, elsewhere n / `samples` for each time that key j is drawn from the n of the document.
    Numerator and denominator are unbiased, over the draws. Han et al. 2023 (2310.05869), Algorithms 1 to 3. The paper's
    causal form sorts queries among later ones, by which outputs depend on the future: there is none here. Linear in
    the length where rows hold one document each; rows with several are told apart in the `[length, length]` matrix.
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features a head; None is d_model / heads"""
    block: int = 256
    """queries and keys of a block (the authors' code: 256)"""
    samples: int = 256
    """keys drawn with replacement, the same for all heads (the authors' code: 256)"""
    planes: int = 7
    """bits of the hash, the sides of random planes (the authors' code: 7)"""
    seed: int = 0
    """of planes and draws"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return HyperAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes without meaning."""
        for name in ("heads", "block", "samples"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
        if not 1 <= self.planes <= 30:
            yield "planes", "must be from 1 to 30"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.head_dim is None and self.heads > 0 and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"

    def sees_future(self) -> bool:
        """Always."""
        return True

    def matmul_params(self, d_model: int) -> int:
        """Weights of the four projections."""
        return 4 * d_model * self.heads * (self.head_dim or d_model // self.heads)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Hashes of a query and a key, a block, and the samples."""
        keys = min(self.block, length) + self.samples
        return 4 * self.heads * (self.head_dim or d_model // self.heads) * (keys + self.planes)


class HyperAttentionModule(nn.Module):
    """Owns `query`, `key`, `value`, `out`; sites q, k, v, z (heads' output)."""

    config: HyperAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length."""
        c = self.config
        head_dim = c.head_dim or self.d_model // c.heads
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "heads", "head_dim")
        q, k, v = (
            site(self, name[0], Linear((self.d_model,), (c.heads, head_dim), axes, kernel, name=name)(x))
            for name in ("query", "key", "value")
        )
        turn, draw = jax.random.split(jax.random.key(c.seed))
        draws = jax.random.uniform(draw, (c.samples,))
        normals = jax.random.normal(turn, (c.heads, head_dim, c.planes))
        z = hyper_attention(q, k, v, context.positions, context.segment_ids, normals, draws, c.block)
        residual = self.initializer.residual(c.heads * head_dim, self.layers)
        inputs, axes = (c.heads, head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, name="out")(site(self, "z", z)), state


def hyper_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None,
    normals: Float[Array, "heads head_dim planes"],
    draws: Float[Array, " samples"],
    block: int,
) -> Float[Array, "batch length heads head_dim"]:
    """The estimate in every document; -1 marks absent tokens. `draws` in [0, 1) are places in a document."""
    ids = present(Tokens(positions), segment_ids)
    rows = Rows(query, key, value, gray_codes(query, normals), gray_codes(key, normals), positions, ids)
    single, several = (partial(form, draws=draws, block=block) for form in (one_document, packed))
    if segment_ids is None:
        return single(rows)
    alone = jnp.all((ids < 0) | (ids == ids.max(axis=1, keepdims=True)))
    return jax.lax.cond(alone, single, several, rows)


class Rows(NamedTuple):
    """What both forms compute from: hashes beside queries and keys, documents (-1: absent) beside positions."""

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length heads head_dim"]
    value: Float[Array, "batch length heads head_dim"]
    query_codes: Int[Array, "batch heads length"]
    key_codes: Int[Array, "batch heads length"]
    positions: Int[Array, "batch length"]
    ids: Int[Array, "batch length"]


def gray_codes(
    x: Float[Array, "batch length heads head_dim"], normals: Float[Array, "heads head_dim planes"]
) -> Int[Array, "batch heads length"]:
    """Place, in the Gray code, of the sides of the planes that x is on: neighbours differ by one plane."""
    sides = jnp.einsum("blhd,hdp->bhlp", x.astype(jnp.float32), normals) > 0
    # A place's bit is the parity of the code's bits from the highest down to it.
    bits = jnp.cumsum(sides, axis=-1, dtype=jnp.int32) % 2
    return jnp.sum(bits << jnp.arange(normals.shape[-1])[::-1], axis=-1, dtype=jnp.int32)


def place(draws: Float[Array, " samples"], count: Int[Array, "..."]) -> Int[Array, "... samples"]:
    """Positions drawn from documents of `count` tokens."""
    return jnp.minimum((draws * count[..., None]).astype(jnp.int32), count[..., None] - 1)


def one_document(
    rows: Rows, draws: Float[Array, " samples"], block: int
) -> Float[Array, "batch length heads head_dim"]:
    """Rows of one document: blocks along the diagonal of the sorted matrix, and the columns drawn."""
    batch, length, heads, _ = rows.query.shape
    absent, size = rows.ids < 0, min(block, length)
    count = jnp.sum(~absent, axis=1)
    codes = (rows.query_codes, rows.key_codes)
    orders = [jnp.lexsort((code, jnp.broadcast_to(absent[:, None], code.shape)), axis=-1) for code in codes]
    ranks = [jnp.argsort(order, axis=-1) for order in orders]

    def cut(x: Array, order: Array) -> Array:
        x = in_blocks(jnp.take_along_axis(jnp.swapaxes(x, 1, 2), order[..., None], axis=2), size)
        return x.reshape(-1, size, 1, x.shape[-1])

    def uncut(x: Array) -> Array:
        x = jnp.take_along_axis(x.reshape(batch, heads, -1, x.shape[-1]), ranks[0][..., None], axis=2)
        return jnp.swapaxes(x, 1, 2)

    there = in_blocks((jnp.arange(length) < count[:, None])[..., None], size)
    there = jnp.repeat(there, heads, axis=0).reshape(-1, 1, 1, size)
    q, k, v = cut(rows.query, orders[0]), cut(rows.key, orders[1]), cut(rows.value, orders[1])
    near, lse = attention(q, k, v, mask=there, return_residual=True, implementation="xla")
    at = jnp.argsort(jnp.where(absent, length, rows.positions), axis=1)
    at = jnp.take_along_axis(at, jnp.maximum(place(draws, count), 0), axis=1)
    k, v = (jnp.take_along_axis(x, at[..., None, None], axis=1) for x in (rows.key, rows.value))
    mine, drawn = ranks[0] // size, jnp.take_along_axis(ranks[1], at[:, None], axis=2) // size
    apart = (mine[..., None] != drawn[:, :, None]) & (count > 0)[:, None, None, None]
    rest, sampled = attention(rows.query, k, v, mask=apart, return_residual=True, implementation="xla")
    sampled = sampled + jnp.log(jnp.maximum(count, 1) / draws.size)[:, None, None]
    return merge_partials(jnp.stack([uncut(near), rest]), jnp.stack([uncut(lse[..., None])[..., 0], sampled]))[0]


def packed(rows: Rows, draws: Float[Array, " samples"], block: int) -> Float[Array, "batch length heads head_dim"]:
    """Rows of several documents: the logarithm of a as a bias of all pairs."""
    mine, others = (ranks_in_document(codes, rows.ids) // block for codes in (rows.query_codes, rows.key_codes))
    same = (rows.ids[:, :, None] == rows.ids[:, None]) & (rows.ids >= 0)[:, None]
    count = jnp.sum(same, axis=2)
    often = jnp.sum(place(draws, count) == rows.positions[..., None], axis=-1)
    near = mine[..., None] == others[:, :, None]
    estimate = jnp.log(jnp.maximum(count * often, 1) / draws.size)[:, None, None]
    mask = same[:, None] & (near | (often > 0)[:, None, None])
    bias = jnp.where(near, 0, estimate)
    return attention(rows.query, rows.key, rows.value, bias, mask, implementation="xla")


def ranks_in_document(
    codes: Int[Array, "batch heads length"], ids: Int[Array, "batch length"]
) -> Int[Array, "batch heads length"]:
    """Every token's place among those of its document, sorted by code and position."""
    ids = jnp.broadcast_to(ids[:, None], codes.shape)
    order = jnp.lexsort((codes, ids), axis=-1)
    by_document = jnp.take_along_axis(ids, order, axis=-1)
    new = jnp.pad(jnp.diff(by_document, axis=-1) != 0, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    index = jnp.arange(codes.shape[-1])
    rank = index - jax.lax.cummax(jnp.where(new, index, 0), axis=2)
    return jnp.take_along_axis(rank, jnp.argsort(order, axis=-1), axis=-1)
