"""S4: a linear state-space model for each feature whose A is diagonal plus rank one, started from HiPPO-LegS."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Int

from llmjax.nn.discretise import as_complex, legs_diagonal_low_rank, log_uniform, repeated
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.long_convolution import long_convolution
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.sites import site
from pallas_kernels.segments import Marks, marks


@dataclass(frozen=True)
class S4(Mixer):
    """y = gelu(ssm(x)) W; per feature h_t = A_bar h_{t-1} + B_bar u_t, out C h_t + D u_t. Gu et al. 2021 (2111.00396).

    A = diag(Lambda) - P P^*, discretised by the bilinear rule. Decoding takes the recurrence in either form.
    """

    d_state: int = 64
    """real states a feature, twice the complex ones (the paper)"""
    dt_min: float = 0.001
    """smallest initial step"""
    dt_max: float = 0.1
    """largest initial step"""
    form: Literal["fft", "recurrent"] = "fft"
    """convolution by FFT with a kernel from its generating function, or token by token"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return S4Module(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.d_state < 2 or self.d_state % 2:
            yield "d_state", "must be even: complex states come in pairs"
        if not 0 < self.dt_min <= self.dt_max:
            yield "dt_min", f"must be positive and at most dt_max={self.dt_max}"

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`ssm`, complex64 (two float32): `[batch, d_model, d_state / 2]` zeros."""
        return {"ssm": jnp.zeros((batch, d_model, self.d_state // 2), jnp.complex64)}

    def matmul_params(self, d_model: int) -> int:
        """d_model^2 of the output projection."""
        return d_model * d_model

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Three real FFTs of 2 length points; or 40 for each complex state."""
        if self.form == "fft":
            return 15 * math.log2(2 * length) * d_model
        return 20 * self.d_state * d_model


class System(NamedTuple):
    """h' = (diag(Lambda) - P P^*) h + B u, y = 2 Re(C h), for one of each pair of states and for every channel.

    P^* h runs over both of a pair, so it is 2 Re of the sum over one: the system is linear over the reals.
    """

    Lambda: Complex[Array, "channels pairs"]
    P: Complex[Array, "channels pairs"]
    B: Complex[Array, "channels pairs"]
    C: Complex[Array, "channels pairs"]
    dt: Float[Array, "channels 1"]


class S4Module(nn.Module):
    """Owns `A_log_real`, `A_imag`, `P_*`, `B_*`, `C_*`, `log_dt`, `D`, `out`; sites u (input), z (what `out` reads)."""

    config: S4
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, from there on."""
        u = site(self, "u", x).astype(jnp.float32)
        system = self.system()
        if state is None and self.config.form == "fft":
            y = long_convolution(u, s4_kernel(system, x.shape[1]).T, context.segment_ids)
        else:
            start = self.config.init_state(self.d_model, x.shape[0], 0, x.dtype) if state is None else state
            y, last = recurrence(system, u, start["ssm"], context.segment_ids)
            state = None if state is None else {"ssm": last}
        D = parameter(self, "D", jax.nn.initializers.normal(1.0), (self.d_model,), ("d_inner",))
        z = site(self, "z", jax.nn.gelu(y + D.astype(jnp.float32) * u, approximate=False).astype(x.dtype))
        residual = self.initializer.residual(self.d_model, self.layers)
        return Linear((self.d_model,), (self.d_model,), ("d_inner", "d_model"), residual, name="out")(z), state

    def system(self) -> System:
        """The continuous system of every feature, and its step."""
        c = self.config
        legs = legs_diagonal_low_rank(c.d_state)
        normal = jax.nn.initializers.normal(math.sqrt(0.5))
        starts = {"A_log_real": repeated(np.log(-legs[0].real)), "A_imag": repeated(legs[0].imag)}
        for name, start in (("P", legs[1]), ("B", legs[2])):
            starts |= {f"{name}_real": repeated(start.real), f"{name}_imag": repeated(start.imag)}
        starts |= {"C_real": normal, "C_imag": normal}
        shape, axes = (self.d_model, c.d_state // 2), ("d_inner", "d_state")
        parts = {name: parameter(self, name, start, shape, axes) for name, start in starts.items()}
        dt = parameter(self, "log_dt", log_uniform(c.dt_min, c.dt_max), shape[:1], axes[:1])
        Lambda = as_complex(-jnp.exp(parts["A_log_real"].astype(jnp.float32)), parts["A_imag"])
        P, B, C = (as_complex(parts[f"{name}_real"], parts[f"{name}_imag"]) for name in "PBC")
        return System(Lambda, P, B, C, jnp.exp(dt.astype(jnp.float32))[:, None])


def both(x: Complex[Array, "... pairs"]) -> Float[Array, "... 1"]:
    """Sum over both states of each pair."""
    return 2 * jnp.sum(x, axis=-1, keepdims=True).real


def bilinear_step(
    system: System, h: Complex[Array, "... channels pairs"], u: Float[Array, "... channels"]
) -> Complex[Array, "... channels pairs"]:
    """(I - dt A / 2)^-1 ((I + dt A / 2) h + dt B u) in O(d_state) a channel, by the formula of Woodbury."""
    Lambda, P, B, _, dt = system
    rest = h + dt / 2 * (Lambda * h - P * both(P.conj() * h)) + dt * B * u[..., None]
    inverse = 1 / (1 - dt / 2 * Lambda)
    correction = dt / 2 * both(P.conj() * inverse * rest) / (1 + dt / 2 * both(P.conj() * inverse * P))
    return inverse * (rest - P * correction)


def recurrence(
    system: System,
    u: Float[Array, "batch length channels"],
    start: Complex[Array, "batch channels pairs"],
    segment_ids: Int[Array, "batch length"] | None,
) -> tuple[Float[Array, "batch length channels"], Complex[Array, "batch channels pairs"]]:
    """Outputs without D u and the last state; zero state at a new segment, and negative ids leave it as it is."""
    here = jnp.ones(u.shape[:2], bool)
    found = marks(segment_ids) or Marks(here, ~here)

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        u, present, reset = token
        after = bilinear_step(system, jnp.where(reset[:, None, None], 0, h), u)
        y = jnp.where(present[:, None], both(system.C * after)[..., 0], 0)
        return jnp.where(present[:, None, None], after, h), y

    h, y = jax.lax.scan(step, start, tuple(jnp.moveaxis(part, 1, 0) for part in (u, *found)))
    return jnp.moveaxis(y, 0, 1), h


def s4_kernel(system: System, length: int) -> Float[Array, "channels length"]:
    """Impulse response K_l = C A_bar^l B_bar for l < length. Gu et al. 2021, section 3.

    Its generating function at the roots of unity is C' (I - A_bar z)^-1 B_bar with C' = C (I - A_bar^length). By the
    bilinear rule that is dt C' (g I - w A)^-1 B with g = 1 - z, w = dt (1 + z) / 2, which the formula of Woodbury makes
    of sums over 1 / (g - w Lambda).
    """
    Lambda, P, B, _, dt = system
    C = truncated(system, length)
    z = jnp.asarray(np.exp(-2j * math.pi * np.arange(length // 2 + 1) / length), jnp.complex64)
    g, w = 1 - z, dt * (1 + z) / 2
    one = 1 / (g[:, None] - w[..., None] * Lambda[:, None])
    other = 1 / (g[:, None] - w[..., None] * Lambda.conj()[:, None])

    def resolvent(row: Complex[Array, "channels pairs"], column: Complex[Array, "channels pairs"]) -> Array:
        product = (row * column)[:, None]
        return jnp.sum(product * one + product.conj() * other, axis=-1)

    low_rank = w * resolvent(C, P) * resolvent(P.conj(), B) / (1 + w * resolvent(P.conj(), P))
    return jnp.fft.irfft(dt * (resolvent(C, B) - low_rank), length, axis=-1)


def truncated(system: System, length: int) -> Complex[Array, "channels pairs"]:
    """C (I - A_bar^length), which cuts the generating function after `length` terms; O(d_state^3 log length)."""
    channels, pairs = system.Lambda.shape
    unit = jnp.eye(pairs, dtype=jnp.complex64)
    basis = jnp.broadcast_to(jnp.concatenate([unit, 1j * unit])[:, None], (2 * pairs, channels, pairs))
    images = jnp.moveaxis(bilinear_step(system, basis, jnp.zeros((2 * pairs, channels))), 0, 1)
    transposed = jnp.concatenate([images.real, images.imag], axis=-1)
    row = jnp.concatenate([system.C.real, -system.C.imag], axis=-1)[..., None]
    row = row - jnp.linalg.matrix_power(transposed, length) @ row
    return as_complex(row[:, :pairs, 0], -row[:, pairs:, 0])
