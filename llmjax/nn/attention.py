"""Multi-head softmax attention: MHA, GQA and MQA under any mask; rotary positions, QK-norm, soft cap, sinks, gate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.masks import AttentionMask, Full
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import Norm
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.scores import scores_of
from llmjax.nn.sites import site
from pallas_kernels.attention.registry import BACKENDS


@dataclass(frozen=True)
class Attention(Mixer):
    """softmax(q k^T scale + mask) v per head. Vaswani et al. 2017 (1706.03762); GQA: Ainslie 2023 (2305.13245)."""

    heads: int = 4
    """query heads"""
    kv_heads: int | None = None
    """key and value heads, a divisor of heads; None is heads (MHA), 1 is MQA"""
    head_dim: int | None = None
    """features a head; None is d_model / heads"""
    causal: bool = True
    """whether a token sees only itself and the past"""
    mask: AttentionMask = Full()
    """which keys a token sees, beside causality and documents"""
    rope: Rope | None = Rope()
    """rotary positions; None where positions are absolute, absent, or a bias by distance"""
    qk_norm: Norm | None = None
    """normalisation of queries and keys over head_dim (Henry et al. 2020, 2010.04245)"""
    qk_norm_over: Literal["head", "all"] = "head"
    """features that are normalised together: those of a head, or those of all heads (OLMo 2, 2501.00656)"""
    soft_cap: float | None = None
    """scores become cap tanh(score / cap) (Gemma 2, 2408.00118)"""
    scale: float | None = None
    """factor of the scores; None is 1 / sqrt(head_dim) (Gemma 2 and T5 have another)"""
    sinks: bool = False
    """whether each head has a learned score without a value (gpt-oss, 2508.10925; Sun et al. 2024, 2402.17762)"""
    gate: bool = False
    """whether sigmoid(x W) multiplies each head's output, feature by feature (Qiu et al. 2025, 2505.06708)"""
    bias: bool = False
    """whether query, key and value projections have a bias"""
    out_bias: bool = False
    """whether the output projection has a bias"""
    implementation: str | None = None
    """kernel of `pallas_kernels.attention`: tpu, cudnn, hopper, xla or reference; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return AttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other."""
        if self.heads < 1:
            yield "heads", "must be at least 1"
        elif self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            divisors = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            listed = " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))
            yield "kv_heads", f"does not divide heads={self.heads}: use {listed}"
        if not self.causal and self.mask.causal_only():
            yield "mask", "is made of past tokens: use causal=True, or another mask"
        if self.implementation is not None and self.implementation not in BACKENDS:
            yield "implementation", f"is no kernel of attention: use one of {', '.join(BACKENDS)}, or None"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width, rotations that do not fit a head."""
        if self.head_dim is None and (self.heads < 1 or d_model % self.heads):
            yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"
        elif self.rope is not None:
            yield from ((f"rope.{field}", why) for field, why in self.rope.problems_at(self.sizes(d_model)[2]))

    def sees_future(self) -> bool:
        """Where it is not causal."""
        return not self.causal

    def any_order(self) -> bool:
        """Where its mask allows it."""
        return self.mask.any_order()

    def distance_heads(self) -> int | None:
        """All heads, where the scores hold no other positions and no cap comes before the bias."""
        return self.heads if self.rope is None and self.soft_cap is None else None

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(heads, kv_heads, head_dim) with the defaults filled in."""
        return self.heads, self.kv_heads or self.heads, self.head_dim or d_model // self.heads

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """An empty cache: `key` and `value`, `[batch, length, kv_heads, head_dim]` of `dtype`."""
        _, kv_heads, head_dim = self.sizes(d_model)
        shape = (batch, length, kv_heads, head_dim)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of the projections, the gate's among them."""
        heads, kv_heads, head_dim = self.sizes(d_model)
        return (2 * (heads + kv_heads) + self.gate * heads) * d_model * head_dim

    def mixing_flops(self, d_model: int, length: int) -> float:
        """4 heads head_dim for every key that a query sees."""
        heads, _, head_dim = self.sizes(d_model)
        return 4 * heads * head_dim * self.mask.keys_seen(length, self.causal)


class AttentionModule(nn.Module):
    """Owns `query`, `key`, `value`, `out`, perhaps `sinks` and `gate`; sites q, k, v (as scored), z (heads' output)."""

    config: Attention
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
        sinks = parameter(self, "sinks", jax.nn.initializers.zeros, (heads,), ("heads",)) if c.sinks else None
        scale = 1 / math.sqrt(head_dim) if c.scale is None else c.scale
        rules = dict(scale=scale, causal=c.causal, soft_cap=c.soft_cap, implementation=c.implementation)
        z = c.mask.attend(scores_of(q, k, v, context, sinks=sinks, **rules))
        if c.gate:
            kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "heads", "head_dim")
            z = z * jax.nn.sigmoid(Linear((self.d_model,), (heads, head_dim), axes, kernel, name="gate")(x))
        z = site(self, "z", z)
        residual = self.initializer.residual(heads * head_dim, self.layers)
        inputs, axes = (heads, head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, c.out_bias, name="out")(z), state

    def project(
        self, x: Float[Array, "batch length d_model"], context: Context
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
        """Queries `[batch, length, heads, head_dim]`, keys and values `[batch, length, kv_heads, head_dim]`."""
        c = self.config
        heads, kv_heads, head_dim = c.sizes(self.d_model)
        kernel = self.initializer.kernel(self.d_model)
        arguments = ((self.d_model,), (heads, head_dim), ("d_model", "heads", "head_dim"), kernel, c.bias)
        q = Linear(*arguments, name="query")(x)
        arguments = ((self.d_model,), (kv_heads, head_dim), ("d_model", "kv_heads", "head_dim"), kernel, c.bias)
        k, v = Linear(*arguments, name="key")(x), Linear(*arguments, name="value")(x)
        if c.qk_norm is not None:
            q, k = self.normed("query_norm", q), self.normed("key_norm", k)
        if c.rope is not None:
            q, k = rotate(q, context.positions, c.rope), rotate(k, context.positions, c.rope)
        return site(self, "q", q), site(self, "k", k), site(self, "v", v)

    def normed(
        self, name: str, x: Float[Array, "batch length heads head_dim"]
    ) -> Float[Array, "batch length heads head_dim"]:
        """Queries or keys after their norm."""
        assert self.config.qk_norm is not None
        norm = self.config.qk_norm.build(name)
        return norm(x) if self.config.qk_norm_over == "head" else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def store(
    cache: Float[Array, "batch cache kv_heads head_dim"],
    new: Float[Array, "batch length kv_heads head_dim"],
    slot: Int[Array, ""],
) -> Float[Array, "batch cache kv_heads head_dim"]:
    """Write this call's keys or values from `slot` on."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), slot, axis=1)
