"""DeltaNet and Gated DeltaNet: a token replaces what the state held under its key, after the state has faded."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.scans import causal_convolution, gated_delta_rule
from llmjax.nn.sites import site

KERNELS = {"chunked": "xla", "recurrent": "reference"}
"""Which implementation of `gated_delta_rule` computes a form."""


@dataclass(frozen=True)
class DeltaNet(Mixer):
    """o_t = S_t^T q_t / sqrt(key_dim), S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T; y = norm(o) W_out.

    q, k, v are projections, a short causal convolution and SiLU; q and k get length 1; beta = sigmoid(x W).
    Yang et al. 2024 (2406.06484).
    """

    heads: int = 4
    """heads of values"""
    key_heads: int | None = None
    """heads of queries and keys, a divisor of heads; None is heads"""
    key_dim: int | None = None
    """features of a query and key; None is d_model / heads"""
    value_dim: int | None = None
    """features of a value; None is d_model / heads"""
    taps: int = 4
    """tokens that the short convolutions see"""
    gate: bool = False
    """whether silu(x W) multiplies the normalised output"""
    negative: bool = False
    """whether beta goes up to 2, so that what a key held may change its sign (Grazzi et al. 2024, 2411.12537)"""
    norm: Norm = RMSNorm()
    """normalisation of each head's output"""
    form: Literal["chunked", "recurrent"] = "chunked"
    """products within chunks of tokens, or token by token; equal up to rounding"""

    decays: ClassVar[bool] = False
    """Whether the state fades."""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return DeltaNetModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        for name in ("heads", "taps"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            yield "key_heads", f"does not divide heads={self.heads}"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.heads > 0 and None in (self.key_dim, self.value_dim) and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give key_dim and value_dim"

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(key_heads, key_dim, value_dim) with the defaults filled in."""
        width = d_model // self.heads
        return self.key_heads or self.heads, self.key_dim or width, self.value_dim or width

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`state` `[batch, heads, key_dim, value_dim]`, float32, and the last taps - 1 inputs of each convolution."""
        key_heads, key_dim, value_dim = self.sizes(d_model)
        widths = {"query": key_heads * key_dim, "key": key_heads * key_dim, "value": self.heads * value_dim}
        inputs = {name: jnp.zeros((batch, self.taps - 1, width), dtype) for name, width in widths.items()}
        return {"state": jnp.zeros((batch, self.heads, key_dim, value_dim), jnp.float32), **inputs}

    def matmul_params(self, d_model: int) -> int:
        """Weights of the projections."""
        key_heads, key_dim, value_dim = self.sizes(d_model)
        of_value = self.heads * ((2 + self.gate) * value_dim + 1 + self.decays)
        return d_model * (2 * key_heads * key_dim + of_value)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """The state read twice and written once, and the convolutions."""
        key_heads, key_dim, value_dim = self.sizes(d_model)
        convolved = 2 * key_heads * key_dim + self.heads * value_dim
        return 6 * self.heads * key_dim * value_dim + 2 * self.taps * convolved


@dataclass(frozen=True)
class GatedDeltaNet(DeltaNet):
    """`DeltaNet` whose state fades: S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T.

    a_t = exp(-exp(r_h) softplus(x W + b)), one number a head. Yang et al. 2024 (2412.06464); Qwen3-Next, OLMo Hybrid.
    """

    gate: bool = True

    decays: ClassVar[bool] = True


class DeltaNetModule(nn.Module):
    """Owns `query`, `key`, `value` and their `_taps`, `write`, `norm`, `out`, perhaps `gate`, `decay`, `decay_rate`.

    Sites q, k, v (as the rule takes them), beta, log_decay, z (before `out`).
    """

    config: DeltaNet
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, after the tokens that it holds."""
        c, init, ids = self.config, self.initializer, context.segment_ids
        key_heads, key_dim, value_dim = c.sizes(self.d_model)
        last = dict.fromkeys(("state", "query", "key", "value")) if state is None else state
        q, past_q = self.convolved("query", x, (key_heads, key_dim), ids, last["query"])
        k, past_k = self.convolved("key", x, (key_heads, key_dim), ids, last["key"])
        v, past_v = self.convolved("value", x, (c.heads, value_dim), ids, last["value"])
        q, k, v = site(self, "q", unit(q)), site(self, "k", unit(k)), site(self, "v", v)
        per_head, kernel = ("d_model", "heads"), init.kernel(self.d_model)
        beta = Linear((self.d_model,), (c.heads,), per_head, kernel, name="write")(x)
        beta = site(self, "beta", (1 + c.negative) * jax.nn.sigmoid(beta.astype(jnp.float32)))
        z, final = gated_delta_rule(
            q,
            k,
            v,
            beta,
            self.log_decay(x),
            scale=1 / math.sqrt(key_dim),
            initial_state=last["state"],
            segment_ids=ids,
            implementation=KERNELS[c.form],
        )
        z = c.norm.build("norm")(z)
        if c.gate:
            axes = ("d_model", "heads", "head_dim")
            z = z * jax.nn.silu(Linear((self.d_model,), (c.heads, value_dim), axes, kernel, name="gate")(x))
        z = site(self, "z", z)
        residual = init.residual(c.heads * value_dim, self.layers)
        y = Linear((c.heads, value_dim), (self.d_model,), ("heads", "head_dim", "d_model"), residual, name="out")(z)
        return y, state if state is None else {"state": final, "query": past_q, "key": past_k, "value": past_v}

    def convolved(
        self,
        name: str,
        x: Float[Array, "batch length d_model"],
        shape: tuple[int, int],
        segment_ids: Int[Array, "batch length"] | None,
        last: Float[Array, "batch taps_before width"] | None,
    ) -> tuple[Float[Array, "batch length heads dim"], Float[Array, "batch taps_before width"]]:
        """silu(convolution(x W)), and the inputs that the next tokens' convolution needs."""
        taps, width, axes = self.config.taps, math.prod(shape), ("heads", "head_dim")
        projected = Linear(
            (self.d_model,), shape, ("d_model", *axes), self.initializer.kernel(self.d_model), name=name
        )(x)
        normal = jax.nn.initializers.normal(1 / math.sqrt(3 * taps))
        kernel = parameter(self, name + "_taps", normal, (taps, *shape), ("taps", *axes)).reshape(taps, width)
        flat = projected.reshape(*x.shape[:2], width)
        y, latest = causal_convolution(flat, kernel, initial_state=last, segment_ids=segment_ids)
        return jax.nn.silu(y).reshape(projected.shape), latest if last is None else latest.astype(last.dtype)

    def log_decay(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length heads"] | None:
        """-exp(r_h) softplus(x W + b), float32; r and b begin like those of Mamba-2."""
        c = self.config
        if not c.decays:
            return None
        kernel = self.initializer.kernel(self.d_model)
        step = Linear((self.d_model,), (c.heads,), ("d_model", "heads"), kernel, name="decay")(x)
        bias = parameter(self, "decay_bias", step_bias, (c.heads,), ("heads",))
        rate = parameter(self, "decay_rate", log_rate, (c.heads,), ("heads",))
        step = jax.nn.softplus(step.astype(jnp.float32) + bias)
        return site(self, "log_decay", -jnp.exp(rate.astype(jnp.float32)) * step)


def unit(x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """x / sqrt(|x|^2 + 1e-6) over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def log_rate(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """log of a uniform number in [1, 16)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


def step_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """softplus^-1 of steps that are log-uniform in [0.001, 0.1)."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(0.001), math.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))
