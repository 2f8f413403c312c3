"""From h' = A h + B u to h_t = A_bar h_{t-1} + B_bar u_t: discretisations, and what A and the step start from.

A real system of N states whose A has no real eigenvalue is held as N / 2 complex states, one of each conjugate pair:
its output is 2 Re(C h).
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from llmjax.nn.initializers import Initializer

Discretisation = Literal["zoh", "bilinear"]
Diagonal = Literal["lin", "inv", "real", "legs"]


def discretise(
    method: Discretisation, A: Complex[Array, "... d_state"], dt: Float[Array, "... #d_state"]
) -> tuple[Complex[Array, "... d_state"], Complex[Array, "... d_state"]]:
    """(A_bar, B_bar) of a diagonal A and B = 1, element by element, for steps dt.

    zoh, for an input that is constant over a step: A_bar = exp(dt A), B_bar = (exp(dt A) - 1) / A.
    bilinear (Tustin): A_bar = (1 + dt A / 2) / (1 - dt A / 2), B_bar = dt / (1 - dt A / 2).
    Both keep Re(A) < 0 stable: |A_bar| < 1.
    """
    if method == "zoh":
        return jnp.exp(dt * A), jnp.expm1(dt * A) / A
    return (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)


def as_complex(real: Float[Array, "..."], imag: Float[Array, "..."]) -> Complex[Array, "..."]:
    """real + i imag, complex64."""
    return jax.lax.complex(real.astype(jnp.float32), imag.astype(jnp.float32))


def diagonal(kind: Diagonal, d_state: int) -> np.ndarray:
    """Initial diagonal A as `[d_state / 2]` complex numbers. Gu et al. 2022 (2206.11893).

    lin -1/2 + i pi n; inv -1/2 + i N/pi (N / (2n + 1) - 1); real -(n + 1); legs the eigenvalues of HiPPO-LegS without
    its term of rank one, with a positive imaginary part.
    """
    n = np.arange(d_state // 2)
    if kind == "lin":
        return -0.5 + 1j * math.pi * n
    if kind == "inv":
        return -0.5 + 1j * d_state / math.pi * (d_state / (2 * n + 1) - 1)
    if kind == "real":
        return -(n + 1.0) + 0j
    return legs_diagonal_low_rank(d_state)[0]


def legs(d_state: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS, the state that projects the past on Legendre polynomials: A `[N, N]` and B `[N]`.

    A_nk = -sqrt((2n + 1)(2k + 1)) for n > k, -(n + 1) for n = k, 0 above; B_n = sqrt(2n + 1). Gu 2020 (2008.07669).
    """
    root = np.sqrt(2 * np.arange(d_state) + 1.0)
    return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(d_state) + 1.0), root


def legs_diagonal_low_rank(d_state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS in the unitary basis where A = diag(Lambda) - P P^*: (Lambda, P, B), each `[d_state / 2]` complex.

    A + p p^T with p_n = sqrt(n + 1/2) is -1/2 plus a skew-symmetric matrix. Gu et al. 2021 (2111.00396), appendix C.
    """
    A, B = legs(d_state)
    P = np.sqrt(np.arange(d_state) + 0.5)
    skew = A + np.outer(P, P) + 0.5 * np.eye(d_state)
    frequencies, basis = np.linalg.eigh(-1j * skew)
    half = basis[:, d_state // 2 :].conj().T
    return -0.5 + 1j * frequencies[d_state // 2 :], half @ P, half @ B


def log_uniform(low: float, high: float) -> Initializer:
    """Initialiser of log dt: dt between `low` and `high`, uniform in its logarithm."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        return jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))

    return init


def softplus_step(low: float, high: float) -> Initializer:
    """Initialiser of b where dt = softplus(b): dt as `log_uniform` has it."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        dt = jnp.exp(log_uniform(low, high)(key, shape, dtype))
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


def repeated(values: np.ndarray) -> Initializer:
    """Initialiser that gives every channel the same `values`."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        return jnp.broadcast_to(jnp.asarray(values, dtype), shape)

    return init
