"""Linformer: keys and values of a whole document are projected to a fixed number of slots, which all tokens see."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmjax.config import InputError
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scores import Scores, Tokens, present
from llmjax.nn.sites import site


@dataclass(frozen=True)
class Linformer(Mixer):
    """softmax(q (E^T k)^T / sqrt(head_dim)) (F^T v), E and F `[length, rank]`. Wang et al. 2020 (2006.04768).

    E and F are rows by position in the document, shared by the heads; each token sees the whole document, through its
    `rank` slots. Linear in the length where rows hold one document each; rows with several are told apart in the
    `[length, length]` matrix, with the same result.
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features a head; None is d_model / heads"""
    rank: int = 128
    """slots that keys and values are projected to (the paper: 128 for 512 tokens)"""
    length: int = 512
    """tokens of a row that there are projections for; longer input is an error"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return LinformerModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes without meaning."""
        for name in ("heads", "rank", "length"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.head_dim is None and self.heads > 0 and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"

    def sees_future(self) -> bool:
        """Always: a slot holds all tokens."""
        return True

    def matmul_params(self, d_model: int) -> int:
        """Weights of the four projections of features."""
        return 4 * d_model * self.heads * (self.head_dim or d_model // self.heads)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Keys and values projected to `rank` slots, and attention to these."""
        return 8 * self.rank * self.heads * (self.head_dim or d_model // self.heads)


class LinformerModule(nn.Module):
    """Owns `query`, `key`, `value`, `out`, `key_slots` (E), `value_slots` (F); sites q, k, v, z (heads' output)."""

    config: Linformer
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; raises InputError where rows are longer than the projections."""
        c, initial = self.config, self.initializer
        if x.shape[1] > c.length:
            raise InputError(f"length {x.shape[1]} exceeds the {c.length} tokens of the Linformer's projections")
        head_dim = c.head_dim or self.d_model // c.heads
        kernel, axes = initial.kernel(self.d_model), ("d_model", "heads", "head_dim")
        q, k, v = (
            site(self, name[0], Linear((self.d_model,), (c.heads, head_dim), axes, kernel, name=name)(x))
            for name in ("query", "key", "value")
        )
        slots = (jax.nn.initializers.normal(1 / math.sqrt(c.rank)), (c.length, c.rank), ("positions", "rank"))
        e, f = parameter(self, "key_slots", *slots), parameter(self, "value_slots", *slots)
        z = linformer(q, k, v, e, f, context.positions, context.segment_ids)
        residual = initial.residual(c.heads * head_dim, self.layers)
        inputs, axes = (c.heads, head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, name="out")(site(self, "z", z)), state


def linformer(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    key_slots: Float[Array, "positions rank"],
    value_slots: Float[Array, "positions rank"],
    positions: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q (E^T k)^T / sqrt(head_dim)) (F^T v) in every document; -1 marks absent tokens.

    Slots that a document's positions do not reach hold zeros, and are seen like the others.
    """
    there = (positions >= 0)[..., None]
    e, f = (jnp.where(there, jnp.take(x, positions, axis=0, mode="clip"), 0) for x in (key_slots, value_slots))
    if segment_ids is None:
        return projected(query, key, value, e, f)
    ids = present(Tokens(positions), segment_ids)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]
    single = jnp.all((ids < 0) | (ids == ids.max(axis=1, keepdims=True)))
    return jax.lax.cond(single, projected, partial(packed, same), query, key, value, e, f)


def projected(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    e: Float[Array, "batch length rank"],
    f: Float[Array, "batch length rank"],
) -> Float[Array, "batch length heads head_dim"]:
    """One document a row: attention to E^T k and F^T v."""
    k, v = jnp.einsum("blr,blhd->brhd", e, key), jnp.einsum("blr,blhd->brhd", f, value)
    queries, slots = (Tokens(jnp.zeros(x.shape[:2], jnp.int32)) for x in (query, k))
    scale = 1 / math.sqrt(query.shape[-1])
    return Scores(query, k, v, queries, slots, scale=scale, causal=False, aligned=False).run()


def packed(
    same: Bool[Array, "batch length length"],
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    e: Float[Array, "batch length rank"],
    f: Float[Array, "batch length rank"],
) -> Float[Array, "batch length heads head_dim"]:
    """Several documents a row: (q k^T) E and softmax(.) F^T, both with the pairs of different documents left out."""
    pairs = jnp.einsum("blhd,bshd->bhls", query, key) * same[:, None] / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.einsum("bhls,bsr->bhlr", pairs, e).astype(jnp.float32), axis=-1)
    over = jnp.einsum("bhlr,bsr->bhls", weights.astype(value.dtype), f) * same[:, None]
    return jnp.einsum("bhls,bshd->blhd", over, value)
