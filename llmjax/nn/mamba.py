"""Mamba: a state-space model whose step, B and C depend on the token, in a gated block with a short convolution."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.discretise import repeated, softplus_step
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scans import selective_scan
from llmjax.nn.short_convolution import ShortConvolution, symmetric_uniform
from llmjax.nn.sites import site
from pallas_kernels.selective_scan.registry import BACKENDS


@dataclass(frozen=True)
class Mamba(Mixer):
    """y = (ssm(u) * silu(x W_gate)) W_out with u = silu(conv(x W_up)). Gu and Dao 2023 (2312.00752).

    ssm, per feature: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, out C_t h_t + D u_t; dt_t = softplus(u_t W W' + b), and
    B_t, C_t are projections of u_t too. A is fixed, diagonal and negative.
    """

    d_state: int = 16
    """states a feature (the paper)"""
    expand: int = 2
    """inner features for each of d_model (the paper)"""
    taps: int = 4
    """tokens that the short convolution sees (the paper)"""
    dt_rank: int | None = None
    """rank of the step's projection; None is d_model / 16, rounded up (the paper)"""
    dt_min: float = 0.001
    """smallest initial step"""
    dt_max: float = 0.1
    """largest initial step"""
    bias: bool = False
    """whether the up, gate and output projections have a bias"""
    conv_bias: bool = True
    """whether the short convolution has a bias"""
    implementation: str | None = None
    """kernel of `pallas_kernels.selective_scan`; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return MambaModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        for field in ("d_state", "expand", "taps"):
            if getattr(self, field) < 1:
                yield field, "must be at least 1"
        if self.dt_rank is not None and self.dt_rank < 1:
            yield "dt_rank", "must be at least 1"
        if not 0 < self.dt_min <= self.dt_max:
            yield "dt_min", f"must be positive and at most dt_max={self.dt_max}"
        if self.implementation is not None and self.implementation not in BACKENDS:
            yield "implementation", f"is no selective scan: use one of {', '.join(BACKENDS)}, or None"

    def sizes(self, d_model: int) -> tuple[int, int]:
        """(d_inner, dt_rank) with the defaults filled in."""
        return self.expand * d_model, self.dt_rank or -(-d_model // 16)

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`ssm` `[batch, d_inner, d_state]` float32; `conv` `[batch, taps - 1, d_inner]` of `dtype`."""
        d_inner, _ = self.sizes(d_model)
        return {
            "conv": jnp.zeros((batch, self.taps - 1, d_inner), dtype),
            "ssm": jnp.zeros((batch, d_inner, self.d_state), jnp.float32),
        }

    def matmul_params(self, d_model: int) -> int:
        """The projections: 3 d_model d_inner and those of dt, B and C."""
        d_inner, rank = self.sizes(d_model)
        return 3 * d_model * d_inner + 2 * d_inner * (rank + self.d_state)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """7 for each state (decay 1, input 2, update 2, read 2), 2 for each tap."""
        d_inner, _ = self.sizes(d_model)
        return d_inner * (7 * self.d_state + 2 * self.taps)


class MambaModule(nn.Module):
    """Owns `up`, `gate`, `conv`, `select`, `step`, `dt_bias`, `A_log`, `D`, `out`; sites u, dt (before softplus), z.

    Without `readout` it returns z `[batch, length, d_inner]` and owns no `out`.
    """

    config: Mamba
    d_model: int
    layers: int
    initializer: Init
    readout: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length features"], State]:
        """Mix along the length; with a `state`, from there on."""
        c = self.config
        d_inner, _ = c.sizes(self.d_model)
        arguments = ((self.d_model,), (d_inner,), ("d_model", "d_inner"), self.initializer.kernel(self.d_model), c.bias)
        u, gate = Linear(*arguments, name="up")(x), Linear(*arguments, name="gate")(x)
        before, start = (None, None) if state is None else (state["conv"], state["ssm"])
        u, before = ShortConvolution(d_inner, c.taps, c.conv_bias, name="conv")(u, context, before)
        z, last = self.scan(site(self, "u", jax.nn.silu(u)), gate, context, start)
        z, state = site(self, "z", z), None if state is None else {"conv": before, "ssm": last}
        if not self.readout:
            return z, state
        residual = self.initializer.residual(d_inner, self.layers)
        return Linear((d_inner,), (self.d_model,), ("d_inner", "d_model"), residual, c.bias, name="out")(z), state

    def scan(
        self,
        u: Float[Array, "batch length d_inner"],
        gate: Float[Array, "batch length d_inner"],
        context: Context,
        start: Float[Array, "batch d_inner d_state"] | None,
    ) -> tuple[Float[Array, "batch length d_inner"], Float[Array, "batch d_inner d_state"]]:
        """The selective state-space model of u, gated, and the state after it."""
        c = self.config
        d_inner, rank = c.sizes(self.d_model)
        kernel = self.initializer.kernel(d_inner)
        selected = Linear((d_inner,), (rank + 2 * c.d_state,), ("d_inner", "rank"), kernel, name="select")(u)
        dt, B, C = jnp.split(selected, (rank, rank + c.d_state), axis=-1)
        dt = site(
            self, "dt", Linear((rank,), (d_inner,), ("rank", "d_inner"), symmetric_uniform(rank), name="step")(dt)
        )
        dt_bias = parameter(self, "dt_bias", softplus_step(c.dt_min, c.dt_max), (d_inner,), ("d_inner",))
        start_A = repeated(np.log(np.arange(c.d_state) + 1.0))
        A_log = parameter(self, "A_log", start_A, (d_inner, c.d_state), ("d_inner", "d_state"))
        D = parameter(self, "D", jax.nn.initializers.ones, (d_inner,), ("d_inner",))
        return selective_scan(
            u,
            dt,
            -jnp.exp(A_log.astype(jnp.float32)),
            B[:, :, None],
            C[:, :, None],
            D.astype(jnp.float32),
            gate,
            dt_bias=dt_bias.astype(jnp.float32),
            dt_softplus=True,
            initial_state=start,
            segment_ids=context.segment_ids,
            implementation=c.implementation,
        )
