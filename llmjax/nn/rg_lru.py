"""Griffin's recurrent block: a real-gated linear recurrent unit behind a short convolution, and a gate."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from llmjax.nn.initializers import Init, Initializer
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scans import linear_recurrence
from llmjax.nn.short_convolution import ShortConvolution
from llmjax.nn.sites import site
from pallas_kernels.linear_recurrence.registry import BACKENDS

SMALLEST = 1e-12
"""Bound of 1 - a^2 from below: its root has a finite gradient."""


@dataclass(frozen=True)
class RGLRU(Mixer):
    """y = (h * gelu(x W_gate)) W_out with u = conv(x W_up). De et al. 2024 (Griffin, 2402.19427), section 2.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t, a_t = exp(-c softplus(Lambda) r_t); r_t = sigmoid(u_t W_r + b_r) and
    i_t = sigmoid(u_t W_i + b_i), both block-diagonal. A document starts with h = i u, as in the authors' code.
    """

    d_inner: int | None = None
    """width of the recurrence; None is d_model (RecurrentGemma 2B)"""
    blocks: int = 16
    """blocks of the gates' weights (the paper)"""
    taps: int = 4
    """tokens that the short convolution sees (the paper)"""
    power: float = 8.0
    """c, by which the recurrence gate can sharpen the decay (the paper)"""
    a_min: float = 0.9
    """smallest initial decay at r = 1 (the paper)"""
    a_max: float = 0.999
    """largest initial decay at r = 1 (the paper)"""
    bias: bool = True
    """whether the up, gate and output projections have a bias (RecurrentGemma)"""
    implementation: str | None = None
    """kernel of `pallas_kernels.linear_recurrence`; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return RGLRUModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        for field in ("blocks", "taps"):
            if getattr(self, field) < 1:
                yield field, "must be at least 1"
        if not self.power > 0:
            yield "power", "must be positive"
        if not 0 < self.a_min < self.a_max < 1:
            yield "a_min", f"must be positive and below a_max={self.a_max}, both below 1"
        if self.implementation is not None and self.implementation not in BACKENDS:
            yield "implementation", f"is no linear recurrence: use one of {', '.join(BACKENDS)}, or None"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Blocks that do not divide the width."""
        if self.blocks > 0 and (self.d_inner or d_model) % self.blocks:
            yield "blocks", f"does not divide d_inner={self.d_inner or d_model}"

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`h` `[batch, d_inner]` float32; `conv` `[batch, taps - 1, d_inner]` of `dtype`, the last inputs."""
        width = self.d_inner or d_model
        return {"conv": jnp.zeros((batch, self.taps - 1, width), dtype), "h": jnp.zeros((batch, width), jnp.float32)}

    def matmul_params(self, d_model: int) -> int:
        """The projections and the two gates' blocks."""
        width = self.d_inner or d_model
        return 3 * d_model * width + 2 * width * width // self.blocks

    def mixing_flops(self, d_model: int, length: int) -> float:
        """2 for the recurrence and 2 for each tap."""
        return (self.d_inner or d_model) * (2 + 2 * self.taps)


class RGLRUModule(nn.Module):
    """Owns `up`, `gate`, `conv`, `recurrence_gate_*`, `input_gate_*`, `Lambda` and `out`; sites u, a, h, z."""

    config: RGLRU
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, from there on."""
        c = self.config
        width = c.d_inner or self.d_model
        arguments = ((self.d_model,), (width,), ("d_model", "d_inner"), self.initializer.kernel(self.d_model), c.bias)
        gate = jax.nn.gelu(Linear(*arguments, name="gate")(x))
        before, start = (None, None) if state is None else (state["conv"], state["h"])
        u = Linear(*arguments, name="up")(x)
        u, before = ShortConvolution(width, c.taps, True, name="conv")(u, context, before)
        u = site(self, "u", u)
        rate = parameter(self, "Lambda", ring(c.a_min, c.a_max, c.power), (width,), ("d_inner",))
        r, i = self.gate("recurrence_gate", u), self.gate("input_gate", u)
        a, b = rg_lru(u, r, i, rate, c.power, context.positions == 0)
        a = site(self, "a", a)
        h, last = linear_recurrence(
            a, b, initial_state=start, segment_ids=context.segment_ids, implementation=c.implementation
        )
        z = site(self, "z", site(self, "h", h.astype(x.dtype)) * gate)
        residual = self.initializer.residual(width, self.layers)
        y = Linear((width,), (self.d_model,), ("d_inner", "d_model"), residual, c.bias, name="out")(z)
        return y, None if state is None else {"conv": before, "h": last}

    def gate(self, name: str, u: Float[Array, "batch length d_inner"]) -> Float[Array, "batch length d_inner"]:
        """sigmoid(u W + b), W block-diagonal, in float32."""
        blocks, size = self.config.blocks, u.shape[-1] // self.config.blocks
        axes, kernel = ("heads", "head_dim", "entries"), self.initializer.kernel(size)
        W = parameter(self, f"{name}_kernel", kernel, (blocks, size, size), axes)
        b = parameter(self, f"{name}_bias", jax.nn.initializers.zeros, (blocks, size), ("heads", "entries"))
        split = u.reshape(*u.shape[:2], blocks, size)
        gate = jnp.einsum("btni,nij->btnj", split, W) + b
        return jax.nn.sigmoid(gate.astype(jnp.float32)).reshape(u.shape)


def rg_lru(
    u: Float[Array, "batch length d_inner"],
    r: Float[Array, "batch length d_inner"],
    i: Float[Array, "batch length d_inner"],
    rate: Float[Array, " d_inner"],
    power: float,
    first: Bool[Array, "batch length"],
) -> tuple[Float[Array, "batch length d_inner"], Float[Array, "batch length d_inner"]]:
    """(a, b) of h_t = a_t h_{t-1} + b_t, float32: a = exp(-power softplus(rate) r), b = sqrt(1 - a^2) i u.

    Where `first` is true, at the start of a document, b = i u.
    """
    log_a = -power * jax.nn.softplus(rate.astype(jnp.float32)) * r
    scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), SMALLEST))
    return jnp.exp(log_a), jnp.where(first[..., None], 1.0, scale) * i * u


def ring(low: float, high: float, power: float) -> Initializer:
    """Initialiser of Lambda: exp(-power softplus(Lambda)) is uniform between `low` and `high`."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        a = jax.random.uniform(key, shape, dtype, low, high)
        return jnp.log(jnp.expm1(-jnp.log(a) / power))

    return init
