"""RG-LRU, minGRU, minLSTM and Hymba beside their recurrences in float64, the papers' other forms, and laws.

Tolerances are relative to the largest value: float32 (6e-8 a rounding) against float64, some tens of terms a sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit, logsumexp

from llmjax.nn.attention import Attention
from llmjax.nn.hymba import Hymba
from llmjax.nn.mamba import Mamba
from llmjax.nn.masks import Window
from llmjax.nn.min_rnn import MinGRU, MinLSTM
from llmjax.nn.rg_lru import RGLRU, rg_lru
from tests.evidence import evidence
from tests.mixers.cases import D_MODEL, apply, forward, params_of
from tests.mixers.test_mamba import convolved, dense, wide, worst

LENGTH = 9
X = np.random.default_rng(31).standard_normal((1, LENGTH, D_MODEL)).astype(np.float32)
POSITIONS = np.arange(LENGTH, dtype=np.int32)[None]
RULES = pytest.mark.parametrize("mixer", [MinGRU(), MinLSTM(expand=2)], ids=["MinGRU", "MinLSTM"])


def log_gates(mixer, p, x):
    """Logarithms of the factors of state and candidate as the paper's appendix B has them."""
    if isinstance(mixer, MinGRU):
        k = dense(p["update"], x)
        return -np.logaddexp(0, k), -np.logaddexp(0, -k)
    forget, write = log_expit(dense(p["forget"], x)), log_expit(dense(p["input"], x))
    total = np.logaddexp(forget, write)
    return forget - total, write - total


def log_g(x):
    return np.where(x >= 0, np.log(np.maximum(x, 0) + 0.5), log_expit(x))


@evidence("B14", oracle="the scan of logarithms of the paper's appendix B, in float64", code="llmjax.nn.min_rnn")
@RULES
def test_min_rnn_equals_the_scan_of_logarithms(mixer, evidence):
    """log h_t = A_t + logsumexp over s <= t of (log b_s - A_s), A the running sum of log keep, h_0 = 0."""
    p = wide(params_of(mixer))
    keep, write = log_gates(mixer, p, X[0])
    A = np.cumsum(keep, axis=0)
    log_b = write + log_g(dense(p["candidate"], X[0]))
    log_h = np.stack([A[t] + logsumexp((log_b - A)[: t + 1], axis=0) for t in range(LENGTH)])
    expected = np.exp(log_h) @ p["out"]["kernel"]
    evidence.record(worst(forward(mixer, params_of(mixer), X, POSITIONS, None)[0], expected), 2e-6)


@evidence("B14", oracle="the recurrence token by token in float64", code="llmjax.nn.min_rnn")
@pytest.mark.parametrize("mixer", [MinGRU(positive=False), MinLSTM(positive=False)], ids=["MinGRU", "MinLSTM"])
def test_min_rnn_equals_its_recurrence(mixer, evidence):
    p = wide(params_of(mixer))
    keep, write = (np.exp(log) for log in log_gates(mixer, p, X[0]))
    np.testing.assert_allclose(keep + write, 1, rtol=1e-12)
    states, h = [], 0
    for t in range(LENGTH):
        h = keep[t] * h + write[t] * dense(p["candidate"], X[0, t])
        states.append(h)
    expected = np.stack(states) @ p["out"]["kernel"]
    evidence.record(worst(forward(mixer, params_of(mixer), X, POSITIONS, None)[0], expected), 2e-6)


@evidence("B14", oracle="z = 1 makes the layer a function of its own token", code="llmjax.nn.min_rnn")
def test_min_gru_with_an_open_gate_is_memoryless(evidence):
    """sigmoid(200) is 1 and sigmoid(-200) is 0 in float32: all blocks of the Jacobian but the diagonal vanish."""
    mixer = MinGRU()
    params = params_of(mixer)
    params = params | {"update": params["update"] | {"bias": np.full(D_MODEL, 200, np.float32)}}
    jacobian = jax.jit(jax.jacrev(lambda x: apply(mixer, params, x[None], POSITIONS, None)[0]))(X[0])
    size = np.abs(np.asarray(jacobian)).max(axis=(1, 3))
    evidence.record(np.abs(size - np.diag(np.diag(size))).max(), 0)
    assert np.diag(size).min() > 0


@pytest.mark.parametrize(
    "mixer", [RGLRU(), RGLRU(d_inner=24, blocks=4, power=5.0, bias=False)], ids=["default", "wide"]
)
def test_rg_lru_equals_its_recurrence(mixer):
    """Equations 1 to 4 of Griffin's section 2.4 token by token; the first token enters as it is."""
    p = wide(params_of(mixer))
    u = convolved(p["conv"], dense(p["up"], X[0]))

    def gate(name):
        blocks = zip(np.split(u, mixer.blocks, axis=1), p[f"{name}_kernel"], p[f"{name}_bias"], strict=True)
        return expit(np.concatenate([part @ W + b for part, W, b in blocks], axis=1))

    a = np.exp(-mixer.power * np.log1p(np.exp(p["Lambda"])) * gate("recurrence_gate"))
    inputs = gate("input_gate") * u
    states = [inputs[0]]
    for t in range(1, LENGTH):
        states.append(a[t] * states[-1] + np.sqrt(1 - a[t] ** 2) * inputs[t])
    y = dense(p["gate"], X[0])
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    expected = dense(p["out"], np.stack(states) * y)
    assert worst(forward(mixer, params_of(mixer), X, POSITIONS, None)[0], expected) < 5e-6


def test_rg_lru_keeps_the_variance_and_its_gradient_is_finite():
    """a^2 + b^2 = 1 for i u = 1, also where the gate closes (a = 1), where the root has an infinite slope."""
    r = jnp.asarray([[[0.0, 1e-12, 1e-6, 0.3, 1.0]]])
    ones, later = jnp.ones_like(r), jnp.zeros((1, 1), bool)

    def parts(r):
        return rg_lru(ones, r, ones, jnp.full(5, -4.0), 8.0, later)

    a, b = parts(r)
    np.testing.assert_allclose(a**2 + b**2, 1, rtol=2e-6)
    assert np.isfinite(jax.grad(lambda r: parts(r)[1].sum())(r)).all()


def test_rg_lru_starts_in_the_ring_of_the_paper():
    """exp(-8 softplus(Lambda)) lies between 0.9 and 0.999."""
    from llmjax.nn.rg_lru import ring

    a = np.exp(-8 * np.log1p(np.exp(np.asarray(ring(0.9, 0.999, 8.0)(jax.random.key(0), (500,)), np.float64))))
    assert 0.9 - 1e-5 < a.min() < 0.91
    assert 0.99 < a.max() < 0.999 + 1e-5
    assert abs(a.mean() - 0.9495) < 0.006  # 4 standard errors of a uniform mean


HYMBA = Hymba(heads=2, kv_heads=1, mask=Window(4), ssm=Mamba(d_state=4))


@evidence("B15", oracle="each branch as a layer of its own, the other's scale zero", code="llmjax.nn.hymba")
@pytest.mark.parametrize("alone", ["attention", "ssm"])
def test_hymba_with_one_branch_silenced_is_the_other(alone, evidence):
    """y = norm(z) / 2 W_out; z comes from Attention and Mamba with the identity for their output projection."""
    params, width = params_of(HYMBA), 2 * D_MODEL
    silenced = {"attention": "ssm", "ssm": "attention"}[alone]
    params = params | {f"{silenced}_norm": {"scale": np.zeros(width, np.float32)}}
    mixer = Attention(heads=2, kv_heads=1, head_dim=D_MODEL, mask=Window(4)) if alone == "attention" else HYMBA.ssm
    halves = []
    for part in np.split(np.eye(width, dtype=np.float32), 2, axis=1):
        kernel = part.reshape(2, D_MODEL, D_MODEL) if alone == "attention" else part
        halves.append(forward(mixer, params[alone] | {"out": {"kernel": kernel}}, X, POSITIONS, None))
    z = np.concatenate([np.asarray(half, np.float64) for half in halves], axis=-1)[0]
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * params[f"{alone}_norm"]["scale"]
    expected = z / 2 @ np.asarray(params["out"]["kernel"], np.float64)
    evidence.record(worst(forward(HYMBA, params, X, POSITIONS, None)[0], expected), 5e-6)


def test_options_that_do_not_fit_are_refused():
    assert dict(RGLRU(taps=0, power=0.0, a_min=1.0, implementation="no").problems()).keys() == {
        *("taps", "power", "a_min", "implementation")
    }
    assert dict(RGLRU(blocks=3).problems_at(D_MODEL)).keys() == {"blocks"}
    assert dict(MinGRU(expand=0, implementation="no").problems()).keys() == {"expand", "implementation"}
    assert dict(Hymba(heads=3, kv_heads=2).problems()).keys() == {"kv_heads"}
    assert dict(Hymba(heads=3).problems_at(D_MODEL)).keys() == {"heads"}
