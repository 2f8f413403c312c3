"""RWKV-6 (Finch) time mixing: a matrix state whose fading, and whose mixing of two tokens, the tokens choose."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.linear_attention import KERNELS, Form, linear_flops
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import layer_norm
from llmjax.nn.rwkv4 import lerp, token_shift
from llmjax.nn.scans import gated_linear_attention
from llmjax.nn.sites import site

READERS = ("receptance", "key", "value", "gate", "decay")
"""What has a mix of two tokens of its own."""


@dataclass(frozen=True)
class RWKV6(Mixer):
    """o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t, S_t = diag(w_t) S_{t-1} + k_t v_t^T, w_t = exp(-exp(w + lora(x_w))).

    y = (silu(g) * groupnorm(o)) W_out. Each of r, k, v, g and w_t reads x_t + (x_{t-1} - x_t) (mu + lora(mixed x)).
    Peng et al. 2024 (2404.05892).
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features a head; None is d_model / heads (the released models: 64)"""
    mix_rank: int = 32
    """width between the two matrices of each mix"""
    decay_rank: int = 64
    """width between the two matrices of the decay"""
    form: Form = "chunked"
    """chunked and recurrent are linear in the length; quadratic holds length^2 head_dim numbers a head"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return RWKV6Module(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        for name in ("heads", "mix_rank", "decay_rank"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.heads > 0 and self.head_dim is None and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"

    def size(self, d_model: int) -> int:
        """head_dim with the default filled in."""
        return self.head_dim or d_model // self.heads

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`token` `[batch, 1, d_model]`, the last one, and `state` `[batch, heads, head_dim, head_dim]`, S."""
        size = self.size(d_model)
        token = jnp.zeros((batch, 1, d_model), dtype)
        return {"token": token, "state": jnp.zeros((batch, self.heads, size, size), jnp.float32)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of receptance, key, value, gate and output, of the mixes and of the decay."""
        inner = self.heads * self.size(d_model)
        mixes = 2 * len(READERS) * self.mix_rank * d_model
        return 5 * d_model * inner + mixes + self.decay_rank * (d_model + inner)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """State written and read, or the matrix."""
        return linear_flops(self.form, self.heads, self.size(d_model), self.size(d_model), length)


class RWKV6Module(nn.Module):
    """Owns `mix`, `mixes`, `mix_in`, `mix_out`, the projections named in `READERS` and `out`, and what decays need.

    Sites r, k, v, log_decay (log w_t), z (before `out`).
    """

    config: RWKV6
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, after the tokens that it holds."""
        c, size = self.config, self.config.size(self.d_model)
        before, token = token_shift(x, context.segment_ids, None if state is None else state["token"])
        mixed = self.mixes(before, x)

        def heads(name: str) -> Float[Array, "batch length heads head_dim"]:
            axes, kernel = ("d_model", "heads", "head_dim"), self.initializer.kernel(self.d_model)
            return Linear((self.d_model,), (c.heads, size), axes, kernel, name=name)(mixed[name])

        r, k, v = site(self, "r", heads("receptance")), site(self, "k", heads("key")), site(self, "v", heads("value"))
        z, final = gated_linear_attention(
            r,
            k,
            v,
            site(self, "log_decay", self.log_decay(mixed["decay"])),
            bonus=parameter(self, "bonus", jax.nn.initializers.zeros, (c.heads, size), ("heads", "head_dim")),
            initial_state=None if state is None else state["state"],
            segment_ids=context.segment_ids,
            implementation=KERNELS[c.form],
        )
        z = site(self, "z", group_norm(self, z) * jax.nn.silu(heads("gate")))
        residual = self.initializer.residual(c.heads * size, self.layers)
        y = Linear((c.heads, size), (self.d_model,), ("heads", "head_dim", "d_model"), residual, name="out")(z)
        return y, state if state is None else {"token": token, "state": final}

    def mixes(
        self, before: Float[Array, "batch length d_model"], x: Float[Array, "batch length d_model"]
    ) -> dict[str, Float[Array, "batch length d_model"]]:
        """What each reader reads: x + (before - x) (mu + tanh(mixed A) B), with one A for all."""
        d_model, rank, count = self.d_model, self.config.mix_rank, len(READERS)
        first = lerp(x, before, parameter(self, "mix", falling, (d_model,), ("d_model",)))
        kernel = self.initializer.kernel(d_model)
        low = Linear((d_model,), (count, rank), ("d_model", "entries", "rank"), kernel, name="mix_in")(first)
        shape, axes = (count, rank, d_model), ("entries", "rank", "d_model")
        up = parameter(self, "mix_out", self.initializer.kernel(rank), shape, axes)
        mu = parameter(self, "mixes", falling, (count, d_model), ("entries", "d_model"))
        mix = mu + jnp.einsum("bler,erd->bled", jnp.tanh(low), up)
        return {name: lerp(x, before, mix[:, :, i]) for i, name in enumerate(READERS)}

    def log_decay(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length heads head_dim"]:
        """-exp(w + tanh(x A) B), float32."""
        c, size = self.config, self.config.size(self.d_model)
        kernel = self.initializer.kernel(self.d_model)
        low = jnp.tanh(Linear((self.d_model,), (c.decay_rank,), ("d_model", "rank"), kernel, name="decay_in")(x))
        axes, kernel = ("rank", "heads", "head_dim"), self.initializer.kernel(c.decay_rank)
        change = Linear((c.decay_rank,), (c.heads, size), axes, kernel, name="decay_out")(low)
        base = parameter(self, "decay", initial_decay, (c.heads, size), ("heads", "head_dim"))
        return -jnp.exp((base + change).astype(jnp.float32))


def group_norm(
    module: nn.Module, x: Float[Array, "batch length heads head_dim"]
) -> Float[Array, "batch length heads head_dim"]:
    """Each head by itself, scale and shift for each channel; eps is 1e-5 head_dim (64e-5 in the released code)."""
    shape, axes = x.shape[-2:], ("heads", "head_dim")
    scale = parameter(module, "norm_scale", jax.nn.initializers.ones, shape, axes)
    bias = parameter(module, "norm_bias", jax.nn.initializers.zeros, shape, axes)
    return layer_norm(x, scale, bias, 1e-5 * shape[-1])


def falling(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """1 - sqrt(i / n) for feature i of n: early features look back, late ones stay with their token."""
    return jnp.broadcast_to(1 - jnp.sqrt(jnp.arange(shape[-1]) / shape[-1]), shape).astype(dtype)


def initial_decay(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """From -6 to -1 over the features of all heads: half-lives of 280 down to 2 tokens."""
    count = shape[0] * shape[1]
    return (-6 + 5 * (jnp.arange(count) / max(count - 1, 1)) ** 0.85).reshape(shape).astype(dtype)
