"""Memorizing Transformer attention: the local context, and the best-scored tokens of a memory of all before it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.attention import store
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.masks import Chunked
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.query_blocks import by_queries
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.scores import Scores, Tokens, dense, scores_of
from llmjax.nn.sites import site

BLOCK = 128
"""Queries that look into the memory at a time."""


@dataclass(frozen=True)
class MemorizingAttention(Mixer):
    """g m + (1 - g) softmax(q k^T scale) v, g = sigmoid(b) per head; m is the same over the memory's best `retrieved`.

    A document is cut into segments: the softmax is over the token's own segment up to itself, the memory holds keys and
    values of the segments before, without positions and without gradient. An empty memory gives m = 0. Wu et al. 2022
    (2203.08913), where the memory also outlives the call and is searched approximately.
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features a head; None is d_model / heads"""
    segment: int = 512
    """tokens of a segment, counted from the document's beginning (the paper: 512)"""
    memory: int = 65536
    """tokens before the segment that are remembered (the paper: up to 262,144)"""
    retrieved: int = 32
    """tokens of the memory that each query and head attends to, all that score as high as the last (the paper: 32)"""
    rope: Rope | None = Rope()
    """rotary positions inside the segment; None where positions are absolute, absent, or a bias by distance"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return MemorizingAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes without meaning."""
        for name in ("heads", "segment", "memory", "retrieved"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
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

    def distance_heads(self) -> int | None:
        """All heads, inside the segment, where the scores hold no other positions."""
        return self.heads if self.rope is None else None

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """An empty cache, which is the memory too: `key` (not turned), `value`, `[batch, length, heads, head_dim]`."""
        shape = (batch, length, self.heads, self.head_dim or d_model // self.heads)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of the projections."""
        return 4 * d_model * self.heads * (self.head_dim or d_model // self.heads)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Local attention, one product for every key remembered, one for every value retrieved."""
        remembered = np.minimum(np.arange(length) // self.segment * self.segment, self.memory)
        local = 2 * Chunked(self.segment).keys_seen(length, True)
        pairs = float(np.mean(remembered + np.minimum(remembered, self.retrieved)))
        return 2 * self.heads * (self.head_dim or d_model // self.heads) * (local + pairs)


class MemorizingAttentionModule(nn.Module):
    """Owns `query`, `key`, `value`, `gate` (b), `out`; sites q, k, v (not turned), recalled (m), z (heads' output)."""

    config: MemorizingAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, over the cached tokens too. Raises ValueError for a prefix."""
        c, positions = self.config, context.positions
        head_dim = c.head_dim or self.d_model // c.heads
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "heads", "head_dim")
        q, k, v = (
            site(self, name[0], Linear((self.d_model,), (c.heads, head_dim), axes, kernel, name=name)(x))
            for name in ("query", "key", "value")
        )
        if state is not None and context.cache is not None:
            slot, positions = context.cache.slot, context.cache.positions
            state = {"key": store(state["key"], k, slot), "value": store(state["value"], v, slot)}
            k, v = state["key"].astype(q.dtype), state["value"].astype(q.dtype)
        gate = jax.nn.sigmoid(parameter(self, "gate", jax.nn.initializers.zeros, (c.heads,), ("heads",)))[:, None]
        scores = scores_of(q, k, v, context, scale=1 / math.sqrt(head_dim))
        recalled = site(self, "recalled", recall(scores, c.segment, c.memory, c.retrieved))
        if c.rope is not None:
            q, k = rotate(q, context.positions, c.rope), rotate(k, positions, c.rope)
            scores = replace(scores, query=q, key=k)
        z = site(self, "z", gate * recalled + (1 - gate) * Chunked(c.segment).attend(scores))
        residual = self.initializer.residual(c.heads * head_dim, self.layers)
        inputs, axes = (c.heads, head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, name="out")(z), state


def recall(scores: Scores, segment: int, memory: int, retrieved: int) -> Float[Array, "batch length heads head_dim"]:
    """Attention to the best-scored keys of earlier segments, at most `memory` tokens before; no gradient into them."""
    key, value = jax.lax.stop_gradient((scores.key, scores.value))
    scores = replace(scores, key=key, value=value, distance=None, aligned=False)

    def block(part: tuple[Array, Tokens]) -> Array:
        some = replace(scores, query=part[0], queries=part[1])
        start = (some.queries.positions // segment * segment)[:, :, None]
        where = some.keys.positions[:, None]
        seen = (dense(some) & (where < start) & (where >= start - memory))[:, None]
        query = jax.lax.stop_gradient(some.query)
        marks = jnp.einsum("blhd,bshd->bhls", query, key, preferred_element_type=jnp.float32)
        marks = jnp.where(seen, marks, -jnp.inf)
        least = jax.lax.top_k(marks, min(retrieved, key.shape[1]))[0][..., -1:]
        return some.run(mask=seen & (marks >= least))

    return by_queries(block, (scores.query, scores.queries), BLOCK)
