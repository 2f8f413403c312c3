"""Additive attention: a small network scores each pair of a query and a key."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from llmjax.nn.attention import store
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.query_blocks import by_queries
from llmjax.nn.scores import dense, scores_of
from llmjax.nn.sites import site

BLOCK = 16
"""Queries scored at a time: each pair has `head_dim` features."""


@dataclass(frozen=True)
class AdditiveAttention(Mixer):
    """softmax_j(w^T tanh(W x_i + U x_j)) V x_j per head. Bahdanau et al. 2014 (1409.0473), among the model's tokens."""

    heads: int = 4
    """heads (the paper: 1)"""
    head_dim: int | None = None
    """hidden features of a pair, and features of a value; None is d_model / heads"""
    causal: bool = True
    """whether a token sees only itself and the past"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return AdditiveAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """No heads."""
        if self.heads < 1:
            yield "heads", "must be at least 1"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.head_dim is None and self.heads > 0 and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"

    def sees_future(self) -> bool:
        """Where it is not causal."""
        return not self.causal

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """An empty cache: `key` (U x) and `value`, `[batch, length, heads, head_dim]` of `dtype`."""
        shape = (batch, length, self.heads, self.head_dim or d_model // self.heads)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of the four projections."""
        return 4 * d_model * self.heads * (self.head_dim or d_model // self.heads)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """A sum, a tanh and two products with features (w, value), for every key that a query sees."""
        keys = (length + 1) / 2 if self.causal else length
        return 6 * self.heads * (self.head_dim or d_model // self.heads) * keys


class AdditiveAttentionModule(nn.Module):
    """Owns `query` (W), `key` (U), `value` (V), `weight` (w), `out`; sites q, k, v, z (heads' output)."""

    config: AdditiveAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, over the cached tokens too."""
        c = self.config
        head_dim = c.head_dim or self.d_model // c.heads
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "heads", "head_dim")
        q, k, v = (
            site(self, name[0], Linear((self.d_model,), (c.heads, head_dim), axes, kernel, name=name)(x))
            for name in ("query", "key", "value")
        )
        if state is not None and context.cache is not None:
            slot = context.cache.slot
            state = {"key": store(state["key"], k, slot), "value": store(state["value"], v, slot)}
            k, v = state["key"].astype(q.dtype), state["value"].astype(q.dtype)
        weight = parameter(
            self, "weight", self.initializer.kernel(head_dim), (c.heads, head_dim), ("heads", "head_dim")
        )
        seen = dense(scores_of(q, k, v, context, causal=c.causal))
        z = site(self, "z", additive_attention(q, k, v, weight, seen))
        residual = self.initializer.residual(c.heads * head_dim, self.layers)
        inputs, axes = (c.heads, head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, name="out")(z), state


def additive_attention(
    query: Float[Array, "batch length heads hidden"],
    key: Float[Array, "batch source heads hidden"],
    value: Float[Array, "batch source heads value_dim"],
    weight: Float[Array, "heads hidden"],
    seen: Bool[Array, "#batch length source"],
) -> Float[Array, "batch length heads value_dim"]:
    """softmax_j(w^T tanh(q_i + k_j)) v_j over the keys seen; zeros where a query sees none.

    Queries and keys are projected already; the softmax is float32. In the paper queries are a decoder's states and keys
    those of an encoder.
    """

    def block(part: tuple[Array, Array]) -> Array:
        q, shown = part
        pairs = jnp.tanh(q[:, :, None] + key[:, None])
        scores = jnp.einsum("blshd,hd->bhls", pairs, weight, preferred_element_type=jnp.float32)
        scores = jnp.where(shown[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jnp.where(shown[:, None], jax.nn.softmax(scores, axis=-1), 0)
        return jnp.einsum("bhls,bshd->blhd", weights.astype(value.dtype), value)

    shown = jnp.broadcast_to(seen, (query.shape[0], *seen.shape[1:]))
    return by_queries(block, (query, shown), BLOCK)
