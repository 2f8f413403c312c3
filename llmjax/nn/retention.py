"""Retention (RetNet): linear attention without softmax whose past fades by a constant factor of each head."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.linear_attention import KERNELS, Form, linear_flops
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import LayerNorm, Norm
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.scans import gated_linear_attention
from llmjax.nn.sites import site


@dataclass(frozen=True)
class Retention(Mixer):
    """o_t = S_t^T q_t, S_t = gamma_h S_{t-1} + k_t v_t^T; y = (silu(x W_gate) * norm(o)) W_out.

    Multi-scale retention, Sun et al. 2023 (2307.08621): gamma_h = 1 - 2^(-5 - h), queries and keys are rotated. The
    paper's scaling of scores by their decay and their sum is left out, because the norm that follows cancels it.
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features of a query and key; None is d_model / heads"""
    value_dim: int | None = None
    """features of a value; None is twice those of a key (the paper)"""
    rope: Rope | None = Rope()
    """rotary positions: the paper's e^(i n theta)"""
    norm: Norm = LayerNorm()
    """normalisation of each head's output (the paper's GroupNorm)"""
    form: Form = "chunked"
    """chunked and recurrent are linear in the length, quadratic is the parallel form; equal up to rounding"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return RetentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other."""
        if self.heads < 1:
            yield "heads", "must be at least 1"
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

    def sizes(self, d_model: int) -> tuple[int, int]:
        """(head_dim, value_dim) with the defaults filled in."""
        head_dim = self.head_dim or d_model // self.heads
        return head_dim, self.value_dim or 2 * head_dim

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`state` `[batch, heads, head_dim, value_dim]`, S."""
        return {"state": jnp.zeros((batch, self.heads, *self.sizes(d_model)), jnp.float32)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of query and key, and of value, gate and output."""
        head_dim, value_dim = self.sizes(d_model)
        return d_model * self.heads * (2 * head_dim + 3 * value_dim)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """State written and read, or the matrix."""
        return linear_flops(self.form, self.heads, *self.sizes(d_model), length)


class RetentionModule(nn.Module):
    """Owns `query`, `key`, `value`, `gate`, `norm`, `out`; sites q, k, v (as they are multiplied), z (before `out`)."""

    config: Retention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, after the tokens that it holds."""
        c = self.config
        head_dim, value_dim = c.sizes(self.d_model)

        def heads(name: str, size: int) -> Float[Array, "batch length heads size"]:
            axes, kernel = ("d_model", "heads", "head_dim"), self.initializer.kernel(self.d_model)
            return Linear((self.d_model,), (c.heads, size), axes, kernel, name=name)(x)

        q, k, v = heads("query", head_dim), heads("key", head_dim), heads("value", value_dim)
        if c.rope is not None:
            q, k = rotate(q, context.positions, c.rope), rotate(k, context.positions, c.rope)
        q, k, v = site(self, "q", q), site(self, "k", k), site(self, "v", v)
        initial = None if state is None else state["state"]
        z, final = retention(q, k, v, retnet_decay(c.heads), context.segment_ids, initial, c.form)
        z = c.norm.build("norm")(z) * jax.nn.silu(heads("gate", value_dim))
        z = site(self, "z", z)
        residual = self.initializer.residual(c.heads * value_dim, self.layers)
        y = Linear((c.heads, value_dim), (self.d_model,), ("heads", "head_dim", "d_model"), residual, name="out")(z)
        return y, state if state is None else {"state": final}


def retnet_decay(heads: int) -> Float[Array, " heads"]:
    """log(1 - 2^(-5 - h)) for h = 0, 1, ...: half-lives of 22, 44, 88, ... tokens."""
    return jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(heads)))


def retention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads value_dim"],
    log_decay: Float[Array, " heads"],
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch heads head_dim value_dim"] | None = None,
    form: Form = "chunked",
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads head_dim value_dim"]]:
    """Sum over j <= i of exp((i - j) log_decay) (q_i^T k_j / sqrt(head_dim)) v_j, and the last token's state."""
    return gated_linear_attention(
        query,
        key,
        value,
        jnp.broadcast_to(log_decay, value.shape[:3]),
        scale=1 / math.sqrt(key.shape[-1]),
        initial_state=initial_state,
        segment_ids=segment_ids,
        implementation=KERNELS[form],
    )
