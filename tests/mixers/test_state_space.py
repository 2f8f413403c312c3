"""Time-invariant state-space mixers beside scipy's linear systems, convolutions of numpy, and closed forms.

Tolerances are relative to the largest value. Ours is float32 (6e-8 a rounding) against float64; powers A_bar^l and
Fourier transforms of some tens of terms cost some tens of roundings.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.special

from llmjax.nn.discretise import diagonal, discretise, legs, legs_diagonal_low_rank
from llmjax.nn.hyena import Hyena
from llmjax.nn.long_convolution import long_convolution
from llmjax.nn.s4 import S4, System, bilinear_step, recurrence, s4_kernel
from llmjax.nn.s4d import S4D
from llmjax.nn.s5 import S5
from tests.evidence import evidence
from tests.mixers.cases import D_MODEL, forms, forward, params_of

RANDOM = np.random.default_rng(11)
LENGTH = 12
X = RANDOM.standard_normal((1, LENGTH, D_MODEL)).astype(np.float32)
POSITIONS = np.arange(LENGTH, dtype=np.int32)[None]


def worst(ours, theirs):
    """Largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def gelu(x):
    return x * scipy.special.ndtr(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def system_of(params):
    """(A, C, dt) of the parameters of an S4D, as float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items() if name != "out"}
    return -np.exp(p["A_log_real"]) + 1j * p["A_imag"], p["C_real"] + 1j * p["C_imag"], np.exp(p["log_dt"])


def scalar_systems(A_bar, inputs):
    """h_t = A_bar h_{t-1} + input_t of every scalar system, by scipy's recursive filter: [length, systems]."""
    return np.stack([scipy.signal.lfilter([1], [1, -a], u) for a, u in zip(A_bar, inputs.T, strict=True)], axis=1)


@evidence("B08", oracle="scipy.signal.cont2discrete", code="llmjax.nn.discretise")
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("kind", ["lin", "inv", "real", "legs"])
def test_discretisations(kind, method, evidence):
    A, dt = diagonal(kind, 8), 0.07
    n = len(A)
    expected = scipy.signal.cont2discrete((np.diag(A), np.ones((n, 1)), np.eye(n), np.zeros((n, 1))), dt, method)
    A_bar, B_bar = discretise(method, jnp.asarray(A, jnp.complex64), jnp.float32(dt))
    evidence.record(worst(A_bar, np.diag(expected[0])), 1e-6)
    evidence.record(worst(B_bar, expected[1][:, 0]), 2e-6)
    for step in (1e-3, 1.0, 100.0):
        assert np.abs(discretise(method, jnp.asarray(A, jnp.complex64), jnp.float32(step))[0]).max() < 1


@evidence("B08", oracle="S4D-Lin -1/2 + i pi n, S4D-Inv, S4D-Real -(n + 1), written out", code="llmjax.nn.discretise")
def test_diagonal_starts(evidence):
    """For N = 6: N / (2n + 1) - 1 is 5, 1, 1/5."""
    expected = {
        "lin": [-0.5, -0.5 + 3.141592653589793j, -0.5 + 6.283185307179586j],
        "inv": [-0.5 + 30 / np.pi * 1j, -0.5 + 6 / np.pi * 1j, -0.5 + 1.2 / np.pi * 1j],
        "real": [-1, -2, -3],
    }
    for kind, values in expected.items():
        evidence.record(np.abs(diagonal(kind, 6) - values).max(), 1e-14)


@evidence("B08", oracle="spectrum and transfer function of HiPPO-LegS by numpy.linalg", code="llmjax.nn.discretise")
def test_hippo(evidence):
    """A is triangular with -1, ..., -N on its diagonal; the rest state of a constant input is its first Legendre term.

    Eigenvalues of this far from normal matrix are ill-conditioned: N = 8 leaves 1e-9 of float64.
    """
    A, B = legs(8)
    evidence.record(np.abs(np.linalg.solve(-A, B) - np.eye(8)[0]).max(), 1e-12)
    Lambda, P, B_low = (np.concatenate([half, half.conj()]) for half in legs_diagonal_low_rank(8))
    low_rank = np.diag(Lambda) - np.outer(P, P.conj())
    eigenvalues = np.sort(np.linalg.eigvals(low_rank).real)
    evidence.record(np.abs(eigenvalues - np.arange(-8, 0)).max(), 1e-8)
    p = np.sqrt(np.arange(8) + 0.5)
    for s in (0.3, 1 + 2j, 7j):
        ours = P.conj() @ np.linalg.solve(s * np.eye(8) - low_rank, B_low)
        evidence.record(abs(ours - p @ np.linalg.solve(s * np.eye(8) - A, B)), 1e-10)
    assert (diagonal("legs", 8).imag > 0).all()


def s4_system(channels, d_state, seed=0):
    random = np.random.default_rng(seed)
    Lambda, P, B = (np.stack([part] * channels) for part in legs_diagonal_low_rank(d_state))
    C = random.standard_normal(P.shape) + 1j * random.standard_normal(P.shape)
    dt = random.uniform(0.02, 0.3, (channels, 1))
    return System(*(jnp.asarray(a, jnp.complex64) for a in (Lambda, P, B, C)), jnp.asarray(dt, jnp.float32))


def discrete(system, channel):
    """(A_bar, B_bar, C) of one channel by scipy, from the dense matrix over both states of each pair."""
    Lambda, P, B, C, dt = (np.asarray(part[channel], np.complex128) for part in system)
    both = [np.concatenate([half, half.conj()]) for half in (Lambda, P, B, C)]
    A = np.diag(both[0]) - np.outer(both[1], both[1].conj())
    dense = (A, both[2][:, None], both[3][None], np.zeros((1, 1)))
    A_bar, B_bar, *_ = scipy.signal.cont2discrete(dense, float(dt[0].real), "bilinear")
    return A_bar, B_bar[:, 0], both[3]


@evidence("B06", oracle="scipy.signal.cont2discrete of the dense system, its powers", code="llmjax.nn.s4")
@pytest.mark.parametrize("length", [11, 12])
def test_s4_kernel_is_the_impulse_response(length, evidence):
    """The generating function at the roots of unity, odd and even (z = -1), and the recurrence, from an impulse."""
    system = s4_system(3, 8)
    expected = np.stack(
        [
            [(C @ np.linalg.matrix_power(A_bar, power) @ B_bar).real for power in range(length)]
            for A_bar, B_bar, C in (discrete(system, channel) for channel in range(3))
        ]
    )
    evidence.record(worst(jax.jit(s4_kernel, static_argnums=1)(system, length), expected), 1e-5)
    impulse = jnp.zeros((1, length, 3)).at[:, 0].set(1)
    y, _ = jax.jit(recurrence)(system, impulse, jnp.zeros((1, 3, 4), jnp.complex64), None)
    evidence.record(worst(y[0].T, expected), 1e-5)


@evidence("B06", oracle="numpy.linalg with the dense matrices of scipy.signal.cont2discrete", code="llmjax.nn.s4")
def test_s4_step(evidence):
    """One step from a random state: the formula of Woodbury against a dense solve."""
    system = s4_system(2, 6, seed=1)
    h = RANDOM.standard_normal((2, 3)) + 1j * RANDOM.standard_normal((2, 3))
    u = RANDOM.standard_normal(2)
    after = np.asarray(bilinear_step(system, jnp.asarray(h, jnp.complex64), jnp.asarray(u, jnp.float32)))
    for channel in range(2):
        A_bar, B_bar, _ = discrete(system, channel)
        full = A_bar @ np.concatenate([h[channel], h[channel].conj()]) + B_bar * u[channel]
        evidence.record(worst(after[channel], full[:3]), 2e-6)


@evidence("B06", oracle="numpy.convolve with the impulse response of scipy's discrete system", code="llmjax.nn.s4")
def test_s4_layer(evidence):
    """Both forms of the whole layer: convolution, D u, gelu and the projection."""
    mixer = S4(d_state=6)
    params = params_of(mixer)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items() if name != "out"}
    parts = [p[f"{name}_real"] + 1j * p[f"{name}_imag"] for name in "PBC"]
    system = System(-np.exp(p["A_log_real"]) + 1j * p["A_imag"], *parts, np.exp(p["log_dt"])[:, None])
    y = np.zeros((LENGTH, D_MODEL))
    for channel in range(D_MODEL):
        A_bar, B_bar, C = discrete(system, channel)
        K = [(C @ np.linalg.matrix_power(A_bar, power) @ B_bar).real for power in range(LENGTH)]
        y[:, channel] = np.convolve(X[0, :, channel], K)[:LENGTH]
    expected = gelu(y + p["D"] * X[0]) @ np.asarray(params["out"]["kernel"], np.float64)
    for form in forms(mixer):
        evidence.record(worst(forward(form, params, X, POSITIONS, None)[0], expected), 1e-5)


@evidence("B07", oracle="scipy.signal.lfilter, one for each scalar system", code="llmjax.nn.s4d")
@pytest.mark.parametrize("mixer", [S4D(d_state=6), S4D(d_state=4, initial="real", discretisation="bilinear")], ids=str)
def test_s4d_is_a_sum_of_scalar_systems(mixer, evidence):
    params = params_of(mixer)
    A, C, dt = system_of(params)
    y = np.zeros((LENGTH, D_MODEL))
    for channel in range(D_MODEL):
        n = A.shape[1]
        dense = (np.diag(A[channel]), np.ones((n, 1)), np.eye(n), np.zeros((n, 1)))
        A_bar, B_bar, *_ = scipy.signal.cont2discrete(dense, dt[channel], mixer.discretisation)
        h = scalar_systems(np.diag(A_bar), X[0, :, channel, None] * B_bar[:, 0])
        y[:, channel] = 2 * (h @ C[channel]).real
    expected = gelu(y + np.asarray(params["D"], np.float64) * X[0]) @ np.asarray(params["out"]["kernel"], np.float64)
    for form in forms(mixer):
        evidence.record(worst(forward(form, params, X, POSITIONS, None)[0], expected), 1e-5)


@evidence("B07", oracle="scipy.signal.lfilter, one for each state", code="llmjax.nn.s5")
def test_s5_is_one_system_of_all_features(evidence):
    mixer = S5(d_state=8, blocks=2, dt_max=1.0)
    params = params_of(mixer)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    A = -np.exp(p["A_log_real"]) + 1j * p["A_imag"]
    A_bar = np.exp(A * np.exp(p["log_dt"]))
    parts = X[0] @ p["B"]["kernel"]
    h = scalar_systems(A_bar, (parts[:, :4] + 1j * parts[:, 4:]) * (A_bar - 1) / A)
    C = p["C"]["kernel"][:4] + 1j * p["C"]["kernel"][4:]
    expected = gelu_tanh(2 * (h @ C).real + p["D"] * X[0]) @ p["out"]["kernel"]
    evidence.record(worst(forward(mixer, params, X, POSITIONS, None)[0], expected), 1e-5)


@pytest.mark.parametrize(
    "segments", [None, [0] * 3 + [1] * 6 + [2] * 2, [-1] * 2 + [0] * 4 + [1, 0, 0, -1, -1]], ids=str
)
def test_long_convolution_stays_within_documents(segments):
    """numpy.convolve of each document by itself. Ids may come back: two segments of id 0 are two."""
    x, kernel = RANDOM.standard_normal((2, 11, 3)), RANDOM.standard_normal((11, 3))
    ids = np.array([segments or [0] * 11] * 2)
    expected = np.zeros_like(x)
    cuts = [0, *np.flatnonzero(np.diff(ids[0])) + 1, 11]
    for start, stop in itertools.pairwise(cuts):
        for row in range(2):
            for channel in range(3):
                y = np.convolve(x[row, start:stop, channel], kernel[: stop - start, channel])[: stop - start]
                expected[row, start:stop, channel] = y * (ids[0, start] >= 0)
    segment_ids = None if segments is None else jnp.asarray(ids, jnp.int32)
    assert worst(jax.jit(long_convolution)(x, kernel, segment_ids), expected) < 1e-6


def hyena_by_hand(p, filters, x):
    """Definition 3.1 of the paper with numpy.convolve, for order 2 and three taps."""
    inner = x @ p["in"]["kernel"]
    taps = p["conv"]["kernel"]
    inner = sum(np.pad(inner, ((2 - w, 0), (0, 0)))[: len(x)] * taps[w] for w in range(3)) + p["conv"]["bias"]
    z, *gates = np.split(inner, 3, axis=-1)
    for gate, h in zip(gates, filters, strict=True):
        z = gate * np.stack([np.convolve(z[:, i], h[:, i])[: len(x)] for i in range(z.shape[1])], axis=1)
    return z @ p["out"]["kernel"]


def test_hyena_against_convolutions_by_hand():
    """With the filters that its network makes, and with the network silenced, which leaves gates alone."""
    mixer = Hyena(filter_length=16, d_filter=8, bands=2, filter_layers=1)
    params = params_of(mixer)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    t = np.arange(LENGTH)[:, None] / 16
    angles = 2 * np.pi * t * np.array([1e-4, 1.0])
    h, f = np.concatenate([t, np.cos(angles), -np.sin(angles)], axis=1), p["filter"]
    for layer in ("0", "1"):
        h = np.sin(f["frequency"] * (h @ f[layer]["kernel"] + f[layer]["bias"]))
    window = np.exp(-t * np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, D_MODEL))
    filters = np.split(h @ f["last"]["kernel"], 2, axis=1)
    filters = [window * filters[n] + np.eye(LENGTH)[:, :1] * f["skip"][n] for n in range(2)]
    assert worst(forward(mixer, params, X, POSITIONS, None)[0], hyena_by_hand(p, filters, X[0])) < 1e-5
    silent = params | {"filter": params["filter"] | {"last": {"kernel": np.zeros((8, 2 * D_MODEL), np.float32)}}}
    filters = [np.eye(LENGTH)[:, :1] * skip for skip in f["skip"]]
    assert worst(forward(mixer, silent, X, POSITIONS, None)[0], hyena_by_hand(p, filters, X[0])) < 1e-5
