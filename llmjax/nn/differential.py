"""Differential attention: the difference of two softmax maps, in which the noise common to both cancels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.attention import store
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.masks import AttentionMask, Full
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.scores import scores_of
from llmjax.nn.sites import site


@dataclass(frozen=True)
class DifferentialAttention(Mixer):
    """(1 - l_0) norm((softmax(q1 k1^T / sqrt(d)) - l softmax(q2 k2^T / sqrt(d))) v) per head, v of 2 d features.

    l = exp(a1 b1) - exp(a2 b2) + l_0 with learned vectors a, b of d features, shared by the heads. Ye et al. 2024
    (2410.05258).
    """

    heads: int = 4
    """heads, each of two softmax maps; half of what a Transformer of this width has"""
    kv_heads: int | None = None
    """heads of keys (in pairs) and values, a divisor of heads; None is heads"""
    head_dim: int | None = None
    """d, features of each query and key; None is d_model / (2 heads)"""
    initial: float = 0.8
    """l_0 (the paper: 0.8 - 0.6 exp(-0.3 (layer - 1)); its ablation finds constants nearly as good)"""
    causal: bool = True
    """whether a token sees only itself and the past"""
    mask: AttentionMask = Full()
    """which keys a token sees, beside causality and documents"""
    rope: Rope | None = Rope()
    """rotary positions; None where positions are absolute, absent, or a bias by distance"""
    norm: Norm = RMSNorm(eps=1e-5)
    """normalisation of each head's output (the authors' code)"""
    implementation: str | None = None
    """kernel of `pallas_kernels.attention`; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return DifferentialAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other."""
        if self.heads < 1:
            yield "heads", "must be at least 1"
        elif self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            yield "kv_heads", f"must divide heads={self.heads}"
        if not 0 <= self.initial < 1:
            yield "initial", "must be at least 0 and below 1"
        if self.rope is not None and self.head_dim is not None:
            yield from ((f"rope.{field}", why) for field, why in self.rope.problems_at(self.head_dim))

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.head_dim is None and self.heads > 0:
            if d_model % (2 * self.heads):
                yield "heads", f"does not divide d_model / 2 = {d_model / 2:g}: change it, or give head_dim"
            elif self.rope is not None:
                found = self.rope.problems_at(d_model // (2 * self.heads))
                yield from ((f"rope.{field}", why) for field, why in found)

    def sees_future(self) -> bool:
        """Where it is not causal."""
        return not self.causal

    def distance_heads(self) -> int | None:
        """All heads, both maps of one with the same bias, where the scores hold no other positions."""
        return self.heads if self.rope is None else None

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(heads, kv_heads, head_dim) with the defaults filled in."""
        return self.heads, self.kv_heads or self.heads, self.head_dim or d_model // (2 * self.heads)

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`key` `[batch, length, 2 kv_heads, head_dim]`, `value` `[batch, length, kv_heads, 2 head_dim]`, empty."""
        _, kv_heads, head_dim = self.sizes(d_model)
        key = jnp.zeros((batch, length, 2 * kv_heads, head_dim), dtype)
        return {"key": key, "value": jnp.zeros((batch, length, kv_heads, 2 * head_dim), dtype)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of the projections."""
        heads, kv_heads, head_dim = self.sizes(d_model)
        return 4 * (heads + kv_heads) * d_model * head_dim

    def mixing_flops(self, d_model: int, length: int) -> float:
        """12 heads head_dim for every key that a query sees: two maps, each with values of twice the features."""
        heads, _, head_dim = self.sizes(d_model)
        return 12 * heads * head_dim * self.mask.keys_seen(length, self.causal)


class DifferentialAttentionModule(nn.Module):
    """Owns `query`, `key`, `value`, `out`, `norm` and the vectors of l, `weight_query` and `weight_key`.

    Heads 2 i and 2 i + 1 of queries and keys are the two of head i. Sites q, k, v (as scored), z (heads' output).
    """

    config: DifferentialAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, over the cached tokens too."""
        c = self.config
        heads, _, head_dim = c.sizes(self.d_model)
        q, k, v = self.project(x, context)
        if state is not None and context.cache is not None:
            slot = context.cache.slot
            state = {"key": store(state["key"], k, slot), "value": store(state["value"], v, slot)}
            k, v = state["key"].astype(q.dtype), state["value"].astype(q.dtype)
        rules = dict(scale=1 / math.sqrt(head_dim), causal=c.causal, implementation=c.implementation)
        pairs = (pair(q), pair(k))
        first, second = (c.mask.attend(scores_of(pairs[0][i], pairs[1][i], v, context, **rules)) for i in (0, 1))
        # Two nearly equal maps cancel: their difference is taken in float32.
        z = first.astype(jnp.float32) - self.weight(head_dim) * second
        z = site(self, "z", ((1 - c.initial) * c.norm.build("norm")(z)).astype(x.dtype))
        residual = self.initializer.residual(2 * heads * head_dim, self.layers)
        inputs, axes = (heads, 2 * head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, name="out")(z), state

    def project(
        self, x: Float[Array, "batch length d_model"], context: Context
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
        """Queries and keys, two heads for each of ours, values with 2 head_dim features."""
        c = self.config
        heads, kv_heads, head_dim = c.sizes(self.d_model)
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "kv_heads", "head_dim")
        q = Linear((self.d_model,), (2 * heads, head_dim), ("d_model", "heads", "head_dim"), kernel, name="query")(x)
        k = Linear((self.d_model,), (2 * kv_heads, head_dim), axes, kernel, name="key")(x)
        v = Linear((self.d_model,), (kv_heads, 2 * head_dim), axes, kernel, name="value")(x)
        if c.rope is not None:
            q, k = rotate(q, context.positions, c.rope), rotate(k, context.positions, c.rope)
        return site(self, "q", q), site(self, "k", k), site(self, "v", v)

    def weight(self, head_dim: int) -> Float[Array, ""]:
        """l, in float32."""
        normal, axes = jax.nn.initializers.normal(0.1), (None, "head_dim")
        a, b = (parameter(self, f"weight_{name}", normal, (2, head_dim), axes) for name in ("query", "key"))
        first, second = jnp.exp(jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1))
        return first - second + self.config.initial


def pair(
    x: Float[Array, "batch length pairs head_dim"],
) -> tuple[Float[Array, "batch length heads head_dim"], Float[Array, "batch length heads head_dim"]]:
    """Even and odd heads."""
    split = x.reshape(*x.shape[:2], -1, 2, x.shape[-1])
    return split[..., 0, :], split[..., 1, :]
