"""Mamba and Mamba-2 blocks beside their recurrence token by token, closed forms and laws (transformers: tests/parity).

Tolerances are relative to the largest value: float32 (6e-8 a rounding) against float64, some tens of terms a sum.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from llmjax.nn.mamba import Mamba
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.min_rnn import MinGRU
from llmjax.nn.rg_lru import RGLRU
from llmjax.nn.s4d import S4D
from llmjax.nn.s5 import S5
from tests.evidence import evidence
from tests.mixers.cases import D_MODEL, INIT, apply, enter, forward, in_parts, params_of

LENGTH = 9
X = np.random.default_rng(21).standard_normal((1, LENGTH, D_MODEL)).astype(np.float32)
POSITIONS = np.arange(LENGTH, dtype=np.int32)[None]
MAMBA = Mamba(d_state=4, bias=True)
MAMBA2 = Mamba2(d_state=4, head_dim=8, groups=2)


def worst(ours, theirs):
    """Largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def wide(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def silu(x):
    return x * expit(x)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def convolved(p, x):
    """The short convolution as a sum of shifted copies."""
    taps = len(p["kernel"])
    shifted = (np.pad(x, ((taps - 1 - w, 0), (0, 0)))[: len(x)] * p["kernel"][w] for w in range(taps))
    return sum(shifted) + p.get("bias", 0)


def mamba_by_hand(c, p, x):
    """Algorithm 2 of the paper, one token and one feature after the other."""
    u, gate = silu(convolved(p["conv"], dense(p["up"], x))), dense(p["gate"], x)
    rank = p["step"]["kernel"].shape[0]
    dt, B, C = np.split(dense(p["select"], u), [rank, rank + c.d_state], axis=-1)
    dt = np.log1p(np.exp(dense(p["step"], dt) + p["dt_bias"]))
    y, h = np.zeros_like(u), np.zeros((u.shape[1], c.d_state))
    for t in range(len(x)):
        for d in range(u.shape[1]):
            h[d] = np.exp(-dt[t, d] * np.exp(p["A_log"][d])) * h[d] + dt[t, d] * B[t] * u[t, d]
            y[t, d] = C[t] @ h[d] + p["D"][d] * u[t, d]
    return dense(p["out"], y * silu(gate))


def mamba2_by_hand(c, p, x):
    """The recurrence of every head, one token after the other."""
    d_inner, heads, _ = c.sizes(x.shape[1])
    inner = silu(convolved(p["conv"], np.concatenate([dense(p["up"], x), dense(p["select"], x)], axis=-1)))
    u, B, C = np.split(inner, [d_inner, d_inner + c.groups * c.d_state], axis=-1)
    u, B, C = u.reshape(-1, heads, c.head_dim), B.reshape(-1, c.groups, c.d_state), C.reshape(-1, c.groups, c.d_state)
    dt = np.log1p(np.exp(dense(p["step"], x) + p["dt_bias"]))
    y, h = np.zeros_like(u), np.zeros((heads, c.head_dim, c.d_state))
    for t in range(len(x)):
        for head in range(heads):
            group = head // (heads // c.groups)
            decay = np.exp(-dt[t, head] * np.exp(p["A_log"][head]))
            h[head] = decay * h[head] + dt[t, head] * np.outer(u[t, head], B[t, group])
            y[t, head] = h[head] @ C[t, group] + p["D"][head] * u[t, head]
    y = (y.reshape(len(x), d_inner) * silu(dense(p["gate"], x))).reshape(len(x), c.groups, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + c.eps)
    return dense(p["out"], y.reshape(len(x), d_inner) * p["norm"])


@evidence("B09", oracle="the recurrence of Algorithm 2, feature by feature, in float64", code="llmjax.nn.mamba")
@evidence("B10", oracle="the block of the paper's figure 3 written out in numpy", code="llmjax.nn.mamba")
def test_mamba_is_its_recurrence(evidence):
    params = params_of(MAMBA)
    evidence.record(
        worst(forward(MAMBA, params, X, POSITIONS, None)[0], mamba_by_hand(MAMBA, wide(params), X[0])), 5e-6
    )


@evidence("B12", oracle="the recurrence of every head in float64", code="llmjax.nn.mamba2")
def test_mamba2_is_its_recurrence(evidence):
    params = params_of(MAMBA2)
    expected = mamba2_by_hand(MAMBA2, wide(params), X[0])
    evidence.record(worst(forward(MAMBA2, params, X, POSITIONS, None)[0], expected), 5e-6)


@evidence("B10", oracle="a gated linear unit, which the block is without convolution and state", code="llmjax.nn.mamba")
def test_mamba_without_a_state_is_a_glu(evidence):
    """One tap of 1, B = C = 0 and D = 1 leave (silu(x W_up) * silu(x W_gate)) W_out."""
    mixer = Mamba(d_state=2, taps=1, conv_bias=False)
    params = params_of(mixer)
    select, d_inner = params["select"]["kernel"].copy(), 2 * D_MODEL
    select[:, -4:] = 0
    ones = np.ones(d_inner, np.float32)
    params = params | {"conv": {"kernel": ones[None]}, "select": {"kernel": select}, "D": ones}
    p = wide(params)
    expected = (silu(dense(p["up"], X[0])) * silu(dense(p["gate"], X[0]))) @ p["out"]["kernel"]
    evidence.record(worst(forward(mixer, params, X, POSITIONS, None)[0], expected), 2e-6)


@evidence("B10", oracle="3 E d^2 + E d (2 R + 3 N + taps + 3), the paper's count", code="llmjax.nn.mamba")
@pytest.mark.parametrize("d_model", [16, 40])
def test_mamba_parameter_count(d_model, evidence):
    """Up, gate, out; per inner feature: dt's two projections R + R, B, C and A 3 N, taps, and biases of conv, dt, D."""
    mixer, rank = Mamba(), -(-d_model // 16)
    shapes = jax.eval_shape(lambda: init(mixer, d_model))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    expected = 3 * 2 * d_model**2 + 2 * d_model * (2 * rank + 3 * 16 + 4 + 3)
    evidence.record(abs(count - expected), 0)
    assert mixer.matmul_params(d_model) == expected - 2 * d_model * (16 + 4 + 3)


def init(mixer, d_model):
    context, _ = enter(jnp.zeros((1, 8), jnp.int32), None, None, None)
    return mixer.build(d_model, 2, INIT).init(jax.random.key(0), jnp.zeros((1, 8, d_model)), context).get("params")


@evidence("B10", oracle="the Jacobian of a causal map is block lower triangular", code="llmjax.nn.mamba")
def test_mamba_jacobian_is_causal(evidence):
    """Exactly 0 above the diagonal, and not 0 anywhere below it: the state reaches back to the first token."""
    mixer = Mamba(d_state=2)
    jacobian = jax.jit(jax.jacrev(lambda x: apply(mixer, params_of(mixer), x[None], POSITIONS, None)[0]))(X[0])
    size = np.abs(np.asarray(jacobian)).max(axis=(1, 3))
    evidence.record(np.triu(size, 1).max(), 0)
    assert (size[np.tril_indices(LENGTH)] > 0).all()


def test_mamba_starts_as_the_paper_says():
    """A = -(1..N), D = 1, dt = softplus(dt_bias) between dt_min and dt_max."""
    p = jax.device_get(jax.jit(lambda: jax.tree.map(jnp.asarray, unboxed(init(Mamba(d_state=5), D_MODEL))))())
    np.testing.assert_allclose(-np.exp(p["A_log"]), np.tile([-1.0, -2, -3, -4, -5], (2 * D_MODEL, 1)), rtol=1e-6)
    dt = np.log1p(np.exp(p["dt_bias"]))
    assert (dt > 0.000999).all()
    assert (dt < 0.1001).all()
    assert dt.max() > 10 * dt.min()
    assert (p["D"] == 1).all()


def unboxed(params):
    from flax.core import meta

    return meta.unbox(params)


@evidence("B17", oracle="the same sequence in one call", code="llmjax.nn.mamba")
@pytest.mark.parametrize(
    "mixer", [MAMBA, MAMBA2, RGLRU(), MinGRU(), S4D(d_state=4), S5(d_state=8)], ids=lambda m: type(m).__name__
)
def test_token_by_token_equals_the_whole(mixer, evidence):
    """Convolution and recurrence carried from call to call: a prompt of three, then single tokens; constant memory."""
    params = params_of(mixer)
    whole = forward(mixer, params, X, POSITIONS, None)
    evidence.record(worst(in_parts(mixer, params, X, POSITIONS, cuts=(3,), room=LENGTH), whole), 2e-5)
    assert mixer.state_bytes(D_MODEL, 10, jnp.float32) == mixer.state_bytes(D_MODEL, 1000, jnp.float32)


def test_options_that_do_not_fit_are_refused():
    problems = dict(Mamba(d_state=0, dt_rank=0, dt_min=0.2, implementation="cuda").problems())
    assert set(problems) == {"d_state", "dt_rank", "dt_min", "implementation"}
    assert dict(Mamba2(implementation="cuda", dt_min=1.0).problems()).keys() == {"implementation", "dt_min"}
    assert dict(Mamba2().problems_at(16)).keys() == {"head_dim"}
    assert dict(dataclasses.replace(MAMBA2, groups=3).problems_at(D_MODEL)).keys() == {"groups"}
    assert not dict(MAMBA2.problems_at(D_MODEL))
