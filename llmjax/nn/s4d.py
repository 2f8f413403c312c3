"""S4D: a linear state-space model with a diagonal A for each feature, as a long convolution or as a scan."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from llmjax.nn.discretise import Diagonal, Discretisation, as_complex, diagonal, discretise, log_uniform, repeated
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.long_convolution import long_convolution
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scans import linear_recurrence
from llmjax.nn.sites import site
from pallas_kernels.linear_recurrence.registry import BACKENDS


@dataclass(frozen=True)
class S4D(Mixer):
    """y = gelu(ssm(x)) W; per feature h_t = A_bar h_{t-1} + B_bar u_t, out 2 Re(C h_t) + D u_t. Gu 2022 (2206.11893).

    A is diagonal, so the state is d_state / 2 independent complex numbers a feature. Decoding scans in either form.
    """

    d_state: int = 64
    """real states a feature, twice the complex ones (S4D)"""
    initial: Diagonal = "lin"
    """initial A: lin, inv, real or legs, see `diagonal` (S4D-Lin)"""
    discretisation: Discretisation = "zoh"
    """how the step enters: zoh or bilinear (S4D's code: zoh)"""
    dt_min: float = 0.001
    """smallest initial step"""
    dt_max: float = 0.1
    """largest initial step"""
    form: Literal["fft", "scan"] = "fft"
    """convolution by FFT, or a parallel scan, which holds all states: d_state times the memory"""
    implementation: str | None = None
    """kernel of `pallas_kernels.linear_recurrence` for the scan; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return S4DModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.d_state < 2 or self.d_state % 2:
            yield "d_state", "must be even: complex states come in pairs"
        if not 0 < self.dt_min <= self.dt_max:
            yield "dt_min", f"must be positive and at most dt_max={self.dt_max}"
        if self.implementation is not None and self.implementation not in BACKENDS:
            yield "implementation", f"is no linear recurrence: use one of {', '.join(BACKENDS)}, or None"

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`ssm`, complex64 (two float32): `[batch, d_model, d_state / 2]` zeros."""
        return {"ssm": jnp.zeros((batch, d_model, self.d_state // 2), jnp.complex64)}

    def matmul_params(self, d_model: int) -> int:
        """d_model^2 of the output projection."""
        return d_model * d_model

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Three real FFTs of 2 length points; or 14 for each complex state (update 10, read 4)."""
        if self.form == "fft":
            return 15 * math.log2(2 * length) * d_model
        return 7 * self.d_state * d_model


class S4DModule(nn.Module):
    """Owns `log_dt`, `A_log_real`, `A_imag`, `C_real`, `C_imag`, `D`, `out`; sites u (input), z (what `out` reads)."""

    config: S4D
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, from there on."""
        u = site(self, "u", x).astype(jnp.float32)
        A_bar, B_bar, C, D = self.system()
        if state is None and self.config.form == "fft":
            kernel = s4d_kernel(A_bar, B_bar * C, x.shape[1])
            y = long_convolution(u, kernel, context.segment_ids)
        else:
            start = None if state is None else state["ssm"]
            h, last = linear_recurrence(
                A_bar,
                B_bar * u[..., None],
                initial_state=start,
                segment_ids=context.segment_ids,
                implementation=self.config.implementation,
            )
            y = 2 * jnp.sum(C * h, axis=-1).real
            state = None if state is None else {"ssm": last}
        z = site(self, "z", jax.nn.gelu(y + D * u, approximate=False).astype(x.dtype))
        residual = self.initializer.residual(self.d_model, self.layers)
        return Linear((self.d_model,), (self.d_model,), ("d_inner", "d_model"), residual, name="out")(z), state

    def system(self) -> tuple[Complex[Array, "d_model pairs"], ...]:
        """A_bar, B_bar and C `[d_model, d_state / 2]`, D `[d_model]`."""
        c = self.config
        shape, axes = (self.d_model, c.d_state // 2), ("d_inner", "d_state")
        start = diagonal(c.initial, c.d_state)
        real = parameter(self, "A_log_real", repeated(np.log(-start.real)), shape, axes)
        imag = parameter(self, "A_imag", repeated(start.imag), shape, axes)
        normal = jax.nn.initializers.normal(math.sqrt(0.5))
        C = as_complex(parameter(self, "C_real", normal, shape, axes), parameter(self, "C_imag", normal, shape, axes))
        dt = parameter(self, "log_dt", log_uniform(c.dt_min, c.dt_max), shape[:1], axes[:1])
        A = as_complex(-jnp.exp(real.astype(jnp.float32)), imag)
        A_bar, B_bar = discretise(c.discretisation, A, jnp.exp(dt.astype(jnp.float32))[:, None])
        D = parameter(self, "D", jax.nn.initializers.normal(1.0), shape[:1], axes[:1])
        return A_bar, B_bar, C, D.astype(jnp.float32)


def s4d_kernel(
    A_bar: Complex[Array, "channels pairs"], C: Complex[Array, "channels pairs"], length: int
) -> Float[Array, "length channels"]:
    """Impulse response K_l = 2 Re(sum over n of C_n A_bar_n^l), B_bar taken into C."""
    powers = jnp.ones((1, *A_bar.shape), A_bar.dtype)
    while powers.shape[0] < length:
        powers, A_bar = jnp.concatenate([powers, powers * A_bar]), A_bar * A_bar
    return 2 * jnp.sum(C * powers[:length], axis=-1).real
