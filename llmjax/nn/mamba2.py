"""Mamba-2: heads whose state decays by one number a token, B and C shared by groups of heads, a gated norm."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.discretise import softplus_step
from llmjax.nn.initializers import Init, Initializer
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import rms_norm
from llmjax.nn.scans import ssd
from llmjax.nn.short_convolution import ShortConvolution
from llmjax.nn.sites import site
from pallas_kernels.gated_linear_attention.registry import BACKENDS


@dataclass(frozen=True)
class Mamba2(Mixer):
    """y = norm(ssd(u, B, C) * silu(x W_gate)) W_out, (u, B, C) = silu(conv(x W)). Dao and Gu 2024 (2405.21060).

    ssd, per head: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t^T, out h_t C_t + D u_t, with dt_t = softplus(x W_dt + b) and
    scalars A and D. The norm is over each group's features.
    """

    d_state: int = 128
    """states a feature (the paper)"""
    expand: int = 2
    """inner features for each of d_model (the paper)"""
    head_dim: int = 64
    """features that share a decay (the paper)"""
    groups: int = 1
    """pairs of B and C, each shared by heads / groups heads (the paper)"""
    taps: int = 4
    """tokens that the short convolution sees (the paper)"""
    dt_min: float = 0.001
    """smallest initial step"""
    dt_max: float = 0.1
    """largest initial step"""
    bias: bool = False
    """whether the projections have a bias"""
    conv_bias: bool = True
    """whether the short convolution has a bias"""
    eps: float = 1e-5
    """added to the mean square in the norm"""
    implementation: str | None = None
    """kernel of `pallas_kernels.gated_linear_attention`; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return Mamba2Module(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        for field in ("d_state", "expand", "head_dim", "groups", "taps"):
            if getattr(self, field) < 1:
                yield field, "must be at least 1"
        if not 0 < self.dt_min <= self.dt_max:
            yield "dt_min", f"must be positive and at most dt_max={self.dt_max}"
        if self.implementation is not None and self.implementation not in BACKENDS:
            yield "implementation", f"is no gated linear attention: use one of {', '.join(BACKENDS)}, or None"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not fill the inner width, groups that do not divide the heads."""
        d_inner = self.expand * d_model
        if d_inner % self.head_dim:
            yield "head_dim", f"does not divide expand * d_model = {d_inner}"
        elif d_inner // self.head_dim % self.groups:
            yield "groups", f"does not divide the {d_inner // self.head_dim} heads"

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(d_inner, heads, channels of the convolution)."""
        d_inner = self.expand * d_model
        return d_inner, d_inner // self.head_dim, d_inner + 2 * self.groups * self.d_state

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`ssm` `[batch, heads, head_dim, d_state]` float32; `conv` `[batch, taps - 1, channels]` of `dtype`."""
        _, heads, channels = self.sizes(d_model)
        return {
            "conv": jnp.zeros((batch, self.taps - 1, channels), dtype),
            "ssm": jnp.zeros((batch, heads, self.head_dim, self.d_state), jnp.float32),
        }

    def matmul_params(self, d_model: int) -> int:
        """The projections: gate, u, B, C, dt and out."""
        d_inner, heads, channels = self.sizes(d_model)
        return d_model * (2 * d_inner + channels + heads)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """5 for each state as a recurrence (input 1, update 2, read 2), 2 for each tap."""
        d_inner, _, channels = self.sizes(d_model)
        return 5 * d_inner * self.d_state + 2 * self.taps * channels


class Mamba2Module(nn.Module):
    """Owns `up`, `select`, `gate`, `step`, `conv`, `dt_bias`, `A_log`, `D`, `norm`, `out`; sites u, dt, z."""

    config: Mamba2
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, from there on."""
        c = self.config
        d_inner, heads, channels = c.sizes(self.d_model)
        before, start = (None, None) if state is None else (state["conv"], state["ssm"])
        inner = jnp.concatenate(
            [self.project("up", d_inner, "d_inner", x), self.project("select", channels - d_inner, "d_state", x)], -1
        )
        inner, before = ShortConvolution(channels, c.taps, c.conv_bias, name="conv")(inner, context, before)
        u, B, C = jnp.split(jax.nn.silu(inner), (d_inner, d_inner + c.groups * c.d_state), axis=-1)
        dt = site(self, "dt", self.project("step", heads, "heads", x))
        y, last = self.scan(site(self, "u", u), dt, B, C, context, start)
        y = y * jax.nn.silu(self.project("gate", d_inner, "d_inner", x))
        scale = parameter(self, "norm", jax.nn.initializers.ones, (d_inner,), ("norm",))
        grouped = (c.groups, d_inner // c.groups)
        z = rms_norm(y.reshape(*y.shape[:2], *grouped), scale.reshape(grouped), c.eps).reshape(y.shape)
        z = site(self, "z", z)
        residual = self.initializer.residual(d_inner, self.layers)
        y = Linear((d_inner,), (self.d_model,), ("d_inner", "d_model"), residual, c.bias, name="out")(z)
        return y, None if state is None else {"conv": before, "ssm": last}

    def project(
        self, name: str, outputs: int, axis: str, x: Float[Array, "batch length d_model"]
    ) -> Float[Array, "batch length outputs"]:
        """One projection of x."""
        kernel = self.initializer.kernel(self.d_model)
        return Linear((self.d_model,), (outputs,), ("d_model", axis), kernel, self.config.bias, name=name)(x)

    def scan(
        self,
        u: Float[Array, "batch length d_inner"],
        dt: Float[Array, "batch length heads"],
        B: Float[Array, "batch length shared"],
        C: Float[Array, "batch length shared"],
        context: Context,
        start: Float[Array, "batch heads head_dim d_state"] | None,
    ) -> tuple[Float[Array, "batch length d_inner"], Float[Array, "batch heads head_dim d_state"]]:
        """The state-space model of all heads, and the state after it."""
        c, heads = self.config, dt.shape[-1]
        A_log = parameter(self, "A_log", log_of_uniform(1.0, 16.0), (heads,), ("heads",))
        dt_bias = parameter(self, "dt_bias", softplus_step(c.dt_min, c.dt_max), (heads,), ("heads",))
        D = parameter(self, "D", jax.nn.initializers.ones, (heads,), ("heads",))
        shared = (*u.shape[:2], c.groups, c.d_state)
        y, last = ssd(
            u.reshape(*u.shape[:2], heads, c.head_dim),
            dt,
            -jnp.exp(A_log.astype(jnp.float32)),
            B.reshape(shared),
            C.reshape(shared),
            D.astype(jnp.float32),
            dt_bias=dt_bias.astype(jnp.float32),
            dt_softplus=True,
            initial_state=start,
            segment_ids=context.segment_ids,
            implementation=c.implementation,
        )
        return y.reshape(u.shape), last


def log_of_uniform(low: float, high: float) -> Initializer:
    """Initialiser: the logarithm of what is uniform between `low` and `high`."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        return math.log(low) + jnp.log(jax.random.uniform(key, shape, dtype, 1.0, high / low))

    return init
