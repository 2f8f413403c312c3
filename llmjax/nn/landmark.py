"""Landmark attention: the last token of a block says how much the block is worth, its other tokens how to read it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.attention import store
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mask_parts import Blocks, Part, blocks, inside
from llmjax.nn.masks import refuse_prefix
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.query_blocks import by_queries
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.scores import Scores, Tokens, dense, scores_of
from llmjax.nn.sites import site
from pallas_kernels.attention import merge_partials

BLOCK = 128
"""Queries scored at a time."""


@dataclass(frozen=True)
class LandmarkAttention(Mixer):
    """sum_b w_b softmax_{j in b}(s_ij) v_j over earlier blocks b, with own block's tokens at their own weights.

    The weights w_b of blocks and those of the own block's tokens are one softmax, in which a block's score is that of
    its landmark, the last of its `block` tokens; landmarks have no value. The data puts a token of its own in these
    places. Mohtashami and Jaggi 2023 (2305.16300), section 3.1.
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features a head; None is d_model / heads"""
    block: int = 64
    """tokens of a block with its landmark, counted from the document's beginning (the paper: 50 and one)"""
    retrieved: int | None = None
    """earlier blocks that each query and head reads, the best by landmark; None is all, as in training"""
    rope: Rope | None = Rope()
    """rotary positions; None where positions are absolute or absent"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return LandmarkAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes without meaning."""
        if self.heads < 1:
            yield "heads", "must be at least 1"
        if self.block < 2:
            yield "block", "must be at least 2: a token and the landmark"
        if self.retrieved is not None and self.retrieved < 1:
            yield "retrieved", "must be at least 1, or None for all"
        if self.rope is not None and self.head_dim is not None:
            yield from ((f"rope.{field}", why) for field, why in self.rope.problems_at(self.head_dim))

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.head_dim is None and self.heads > 0:
            if d_model % self.heads:
                yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"
            elif self.rope is not None:
                found = self.rope.problems_at(d_model // self.heads)
                yield from ((f"rope.{field}", why) for field, why in found)

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """An empty cache: `key` and `value`, `[batch, length, heads, head_dim]` of `dtype`."""
        shape = (batch, length, self.heads, self.head_dim or d_model // self.heads)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of the projections."""
        return 4 * d_model * self.heads * (self.head_dim or d_model // self.heads)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Own block, all earlier landmarks, and the tokens of the blocks read."""
        i = np.arange(length)
        earlier = i // self.block
        read = earlier if self.retrieved is None else np.minimum(earlier, self.retrieved)
        pairs = float(np.mean(2 * (i % self.block + 1) + earlier + 2 * (self.block - 1) * read))
        return 2 * self.heads * (self.head_dim or d_model // self.heads) * pairs


class LandmarkAttentionModule(nn.Module):
    """Owns `query`, `key`, `value`, `out`; sites q, k, v (as scored), z (heads' output)."""

    config: LandmarkAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, over the cached tokens too. Raises ValueError for a prefix."""
        c = self.config
        head_dim = c.head_dim or self.d_model // c.heads
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "heads", "head_dim")
        q, k, v = (
            Linear((self.d_model,), (c.heads, head_dim), axes, kernel, name=name)(x)
            for name in ("query", "key", "value")
        )
        if c.rope is not None:
            q, k = rotate(q, context.positions, c.rope), rotate(k, context.positions, c.rope)
        q, k, v = site(self, "q", q), site(self, "k", k), site(self, "v", v)
        if state is not None and context.cache is not None:
            slot = context.cache.slot
            state = {"key": store(state["key"], k, slot), "value": store(state["value"], v, slot)}
            k, v = state["key"].astype(q.dtype), state["value"].astype(q.dtype)
        scores = scores_of(q, k, v, replace(context, distance=None), scale=1 / math.sqrt(head_dim))
        z = site(self, "z", landmark_attention(scores, c.block, c.retrieved))
        residual = self.initializer.residual(c.heads * head_dim, self.layers)
        inputs, axes = (c.heads, head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, name="out")(z), state


def landmark_attention(
    scores: Scores, size: int, retrieved: int | None = None
) -> Float[Array, "batch length heads head_dim"]:
    """Own block and earlier blocks of `size` tokens, merged; raises ValueError for a prefix."""
    refuse_prefix(scores, "LandmarkAttention")
    plain = scores.keys.positions % size != size - 1
    near, lse = inside(scores, size, plain)
    earlier = blocks(scores, size)
    if not earlier.key.shape[1]:
        return near

    def block(part: tuple[Array, Tokens]) -> Part:
        return read(replace(scores, query=part[0], queries=part[1]), earlier, size, retrieved)

    far, gate = by_queries(block, (scores.query, scores.queries), BLOCK)
    return merge_partials(jnp.stack([near, far]), jnp.stack([lse, gate]))[0]


def read(scores: Scores, earlier: Blocks, size: int, retrieved: int | None) -> Part:
    """Every earlier block read by a softmax of its own, weighed by the softmax of the landmarks' scores."""
    start = (scores.queries.positions // size * size)[:, :, None]
    seen = dense(replace(scores, keys=earlier.ends, aligned=False)) & (earlier.ends.positions[:, None] < start)
    seen = seen[:, None]
    options: dict[str, Any] = {"preferred_element_type": jnp.float32}
    gates = scores.scale * jnp.einsum("blhd,bnhd->bhln", scores.query, earlier.key[:, :, -1], **options)
    if retrieved is not None and retrieved < gates.shape[-1]:
        marks = jnp.where(seen, jax.lax.stop_gradient(gates), -jnp.inf)
        seen = seen & (marks >= jax.lax.top_k(marks, retrieved)[0][..., -1:])
    gates = jnp.where(seen, gates, jnp.finfo(jnp.float32).min)
    inner = scores.scale * jnp.einsum("blhd,bnshd->bhlns", scores.query, earlier.key[:, :, :-1], **options)
    weights = jax.nn.softmax(gates, axis=-1)[..., None] * jax.nn.softmax(inner, axis=-1)
    out = jnp.einsum("bhlns,bnshd->blhd", weights.astype(scores.value.dtype), earlier.value[:, :, :-1])
    total = jnp.where(jnp.any(seen, axis=-1), jax.nn.logsumexp(gates, axis=-1), -jnp.inf)
    return out, jnp.swapaxes(total, 1, 2)
