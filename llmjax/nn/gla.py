"""Gated linear attention (GLA): every key dimension of the state fades by a factor that the token chooses."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.linear_attention import KERNELS, Form, linear_flops
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import LayerNorm, Norm
from llmjax.nn.scans import gated_linear_attention
from llmjax.nn.sites import site


@dataclass(frozen=True)
class GLA(Mixer):
    """o_t = S_t^T q_t / sqrt(key_dim), S_t = diag(a_t) S_{t-1} + k_t v_t^T, y = (silu(x W_gate + b) * norm(o)) W_out.

    a_t = sigmoid(x W_1 W_2 + b)^(1 / temperature). Yang et al. 2023 (2312.06635), section 4.4.
    """

    heads: int = 4
    """heads"""
    key_dim: int | None = None
    """features of a query and key; None is d_model / (2 heads) (the paper)"""
    value_dim: int | None = None
    """features of a value; None is d_model / heads (the paper)"""
    rank: int = 16
    """width between the two matrices of the decay"""
    temperature: float = 16.0
    """root of the decay: above 1, states are kept for longer"""
    norm: Norm = LayerNorm()
    """normalisation of each head's output"""
    form: Form = "chunked"
    """chunked and recurrent are linear in the length; quadratic holds length^2 key_dim numbers a head"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return GLAModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        for name in ("heads", "rank"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
        if self.temperature <= 0:
            yield "temperature", "must be above 0"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.heads > 0 and self.key_dim is None and d_model % (2 * self.heads):
            yield "heads", f"twice does not divide d_model={d_model}: change it, or give key_dim"
        elif self.heads > 0 and self.value_dim is None and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give value_dim"

    def sizes(self, d_model: int) -> tuple[int, int]:
        """(key_dim, value_dim) with the defaults filled in."""
        return self.key_dim or d_model // (2 * self.heads), self.value_dim or d_model // self.heads

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`state` `[batch, heads, key_dim, value_dim]`, S."""
        return {"state": jnp.zeros((batch, self.heads, *self.sizes(d_model)), jnp.float32)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of query and key, of value, gate and output, and of the decay."""
        key_dim, value_dim = self.sizes(d_model)
        decay = self.rank * (d_model + self.heads * key_dim)
        return d_model * self.heads * (2 * key_dim + 3 * value_dim) + decay

    def mixing_flops(self, d_model: int, length: int) -> float:
        """State written and read, or the matrix."""
        return linear_flops(self.form, self.heads, *self.sizes(d_model), length)


class GLAModule(nn.Module):
    """Owns `query`, `key`, `value`, `decay_in`, `decay_out`, `gate`, `norm`, `out`.

    Sites q, k, v, log_decay (log a), z (before `out`).
    """

    config: GLA
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, after the tokens that it holds."""
        c, init = self.config, self.initializer
        key_dim, value_dim = c.sizes(self.d_model)

        def heads(name: str, size: int, bias: bool = False) -> Float[Array, "batch length heads size"]:
            axes, kernel = ("d_model", "heads", "head_dim"), init.kernel(self.d_model)
            return Linear((self.d_model,), (c.heads, size), axes, kernel, bias, name=name)(x)

        q, k, v = (
            site(self, n[0], heads(n, d)) for n, d in (("query", key_dim), ("key", key_dim), ("value", value_dim))
        )
        low = Linear((self.d_model,), (c.rank,), ("d_model", "rank"), init.kernel(self.d_model), name="decay_in")(x)
        axes, kernel = ("rank", "heads", "head_dim"), init.kernel(c.rank)
        decay = Linear((c.rank,), (c.heads, key_dim), axes, kernel, bias=True, name="decay_out")(low)
        log_decay = site(self, "log_decay", jax.nn.log_sigmoid(decay.astype(jnp.float32)) / c.temperature)
        z, final = gated_linear_attention(
            q,
            k,
            v,
            log_decay,
            scale=1 / math.sqrt(key_dim),
            initial_state=None if state is None else state["state"],
            segment_ids=context.segment_ids,
            implementation=KERNELS[c.form],
        )
        z = site(self, "z", c.norm.build("norm")(z) * jax.nn.silu(heads("gate", value_dim, bias=True)))
        residual = init.residual(c.heads * value_dim, self.layers)
        y = Linear((c.heads, value_dim), (self.d_model,), ("heads", "head_dim", "d_model"), residual, name="out")(z)
        return y, state if state is None else {"state": final}
