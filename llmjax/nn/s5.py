"""S5: one diagonal state-space model with many inputs and outputs, as a parallel scan."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from llmjax.nn.discretise import Diagonal, Discretisation, as_complex, diagonal, discretise, log_uniform, repeated
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scans import linear_recurrence
from llmjax.nn.sites import site
from pallas_kernels.linear_recurrence.registry import BACKENDS


@dataclass(frozen=True)
class S5(Mixer):
    """h_t = A_bar h_{t-1} + B_bar u_t with u_t all features, y = gelu(2 Re(C h) + D u) W. Smith 2022 (2208.04933).

    The state is one for the layer, d_state / 2 complex numbers with a step each, so that the scan holds d_state numbers
    a token where S4D holds d_state for each feature.
    """

    d_state: int = 64
    """real states of the layer, twice the complex ones"""
    blocks: int = 1
    """copies of an initial A of d_state / blocks states (the paper's block-diagonal start)"""
    initial: Diagonal = "legs"
    """initial A of a block: lin, inv, real or legs, see `diagonal` (the paper: legs)"""
    discretisation: Discretisation = "zoh"
    """how the step enters: zoh or bilinear (the paper: zoh)"""
    dt_min: float = 0.001
    """smallest initial step"""
    dt_max: float = 0.1
    """largest initial step"""
    implementation: str | None = None
    """kernel of `pallas_kernels.linear_recurrence`; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return S5Module(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.blocks < 1:
            yield "blocks", "must be at least 1"
        elif self.d_state < 2 * self.blocks or self.d_state % (2 * self.blocks):
            yield "d_state", f"must be a multiple of {2 * self.blocks}: complex states come in pairs, in each block"
        if not 0 < self.dt_min <= self.dt_max:
            yield "dt_min", f"must be positive and at most dt_max={self.dt_max}"
        if self.implementation is not None and self.implementation not in BACKENDS:
            yield "implementation", f"is no linear recurrence: use one of {', '.join(BACKENDS)}, or None"

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`ssm`, complex64 (two float32): `[batch, d_state / 2]` zeros."""
        return {"ssm": jnp.zeros((batch, self.d_state // 2), jnp.complex64)}

    def matmul_params(self, d_model: int) -> int:
        """B and C, a real and an imaginary part each, and the output projection."""
        return 2 * d_model * self.d_state + d_model * d_model

    def mixing_flops(self, d_model: int, length: int) -> float:
        """14 for each complex state (input 6, update 8)."""
        return 7 * self.d_state


class S5Module(nn.Module):
    """Owns `log_dt`, `A_log_real`, `A_imag`, `B`, `C`, `D`, `out`; sites u (input), z (what `out` reads).

    `B` and `C` are real matrices to and from the real and the imaginary parts of the states.
    """

    config: S5
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, from there on."""
        c, width = self.config, self.d_model
        u = site(self, "u", x)
        A_bar, B_bar = self.system()
        # With variance 1 / 2 a part, B u has the variance of u as the paper's V^* B u does.
        into = jax.nn.initializers.normal(math.sqrt(0.5 / width))
        parts = Linear((width,), (c.d_state,), ("d_model", "d_state"), into, name="B")(u)
        inputs = B_bar * as_complex(*jnp.split(parts, 2, axis=-1))
        start = None if state is None else state["ssm"]
        h, last = linear_recurrence(
            A_bar, inputs, initial_state=start, segment_ids=context.segment_ids, implementation=c.implementation
        )
        parts = jnp.concatenate([2 * h.real, -2 * h.imag], axis=-1).astype(x.dtype)
        out_of = jax.nn.initializers.normal(math.sqrt(0.5 / c.d_state))
        y = Linear((c.d_state,), (width,), ("d_state", "d_model"), out_of, name="C")(parts)
        D = parameter(self, "D", jax.nn.initializers.normal(1.0), (width,), ("d_model",))
        z = site(self, "z", jax.nn.gelu(y + D * u))
        residual = self.initializer.residual(width, self.layers)
        y = Linear((width,), (width,), ("d_inner", "d_model"), residual, name="out")(z)
        return y, None if state is None else {"ssm": last}

    def system(self) -> tuple[Complex[Array, " pairs"], Complex[Array, " pairs"]]:
        """A_bar and B_bar for B = 1."""
        c = self.config
        start = np.tile(diagonal(c.initial, c.d_state // c.blocks), c.blocks)
        real = parameter(self, "A_log_real", repeated(np.log(-start.real)), start.shape, ("d_state",))
        imag = parameter(self, "A_imag", repeated(start.imag), start.shape, ("d_state",))
        dt = parameter(self, "log_dt", log_uniform(c.dt_min, c.dt_max), start.shape, ("d_state",))
        A = as_complex(-jnp.exp(real.astype(jnp.float32)), imag)
        return discretise(c.discretisation, A, jnp.exp(dt.astype(jnp.float32)))
