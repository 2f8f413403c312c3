"""The RWKV layers against their papers' equations, token by token in numpy float64.

Float32 sums of some tens of terms and a normalisation: errors are relative to the largest value, tolerance 2e-5.
"""

import functools
import math

import jax
import numpy as np
import pytest

from llmjax.nn.channel_mixing import ChannelMixing
from llmjax.nn.rwkv4 import RWKV4, wkv
from llmjax.nn.rwkv6 import RWKV6
from llmjax.nn.rwkv7 import RWKV7, wkv7
from tests.evidence import evidence
from tests.mixers.cases import D_MODEL, apply, params_of

TOLERANCE = 2e-5
LENGTH, HEADS, DIM = 12, 2, 8
X = np.random.default_rng(0).standard_normal((1, LENGTH, D_MODEL)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relative(ours, expected):
    return np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()


def wide(mixer):
    """The mixer's parameters as float64, kernels by their module's name."""
    params = params_of(mixer)
    return {name: np.float64(leaf["kernel"] if isinstance(leaf, dict) else leaf) for name, leaf in params.items()}


def layer(mixer):
    return jax.jit(functools.partial(apply, mixer))(params_of(mixer), X)[0]


def tokens():
    """Each token of `X` and the one before it."""
    x = np.float64(X[0])
    return zip(x, np.r_[np.zeros((1, D_MODEL)), x[:-1]], strict=True)


def weights_of_wkv(key, value, log_decay, bonus):
    """RWKV-4's equation by its sums over all earlier tokens, a maximum taken out of each."""
    out = np.zeros_like(value)
    for t in range(len(key)):
        exponents = key[: t + 1] + (t - 1 - np.arange(t + 1))[:, None] * log_decay
        exponents[t] = key[t] + bonus
        weights = np.exp(exponents - exponents.max(0))
        out[t] = (weights * value[: t + 1]).sum(0) / weights.sum(0)
    return out


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
@pytest.mark.parametrize("size", [1, 100])
@evidence("B05", oracle="sums over all pairs in numpy float64", code="llmjax.nn.rwkv4.wkv")
def test_wkv(size, form, evidence):
    """Two documents and padding; keys of some hundreds would overflow without the running exponent.

    An exponent of 300 is good to 3e-5 in float32.
    """
    random = np.random.default_rng(2)
    key, value = (random.standard_normal((1, 20, 5)).astype(np.float32) for _ in range(2))
    log_decay, bonus = (
        -np.exp(random.standard_normal(5)).astype(np.float32),
        random.standard_normal(5).astype(np.float32),
    )
    key, segments = size * key, np.int32([[-1] * 2 + [4] * 8 + [1] * 9 + [-1]])
    out, _ = jax.jit(functools.partial(wkv, form=form))(key, value, log_decay, bonus, segments)
    arrays = [np.float64(x) for x in (log_decay, bonus)]
    for span in (slice(2, 10), slice(10, 19)):
        expected = weights_of_wkv(np.float64(key[0, span]), np.float64(value[0, span]), *arrays)
        evidence.record(relative(out[0, span], expected), TOLERANCE if size == 1 else 1e-4)


@evidence("B05", oracle="numpy float64, the layer written out", code="llmjax.nn.rwkv4.RWKV4")
def test_rwkv4_layer(evidence):
    p = wide(RWKV4())

    def project(name):
        mix = p[name + "_mix"]
        return np.stack([(mix * x + (1 - mix) * before) @ p[name] for x, before in tokens()])

    z = weights_of_wkv(project("key"), project("value"), -np.exp(p["decay"]), p["bonus"])
    evidence.record(relative(layer(RWKV4()), (sigmoid(project("receptance")) * z) @ p["out"]), TOLERANCE)


@pytest.mark.parametrize("gate", [True, False])
@evidence("B05", oracle="numpy float64, the layer written out", code="llmjax.nn.channel_mixing.ChannelMixing")
def test_channel_mixing(gate, evidence):
    mixer = ChannelMixing(d_ff=24, gate=gate)
    p, expected = wide(mixer), []
    for x, before in tokens():
        hidden = np.maximum((p["key_mix"] * x + (1 - p["key_mix"]) * before) @ p["key"], 0) ** 2
        mix = p.get("receptance_mix", 0)
        r = sigmoid((mix * x + (1 - mix) * before) @ p["receptance"]) if gate else 1
        expected.append(r * (hidden @ p["value"]))
    evidence.record(relative(layer(mixer), np.stack(expected)), TOLERANCE)


def group_norm(o, p):
    """Each head's features by themselves."""
    o = o - o.mean(-1, keepdims=True)
    return o / np.sqrt(o.var(-1, keepdims=True) + 1e-5 * o.shape[-1]) * p["norm_scale"] + p["norm_bias"]


def low_rank(p, name, low):
    """The second matrix of a pair."""
    return np.einsum("r,rhe->he", low, p[name + "_out"])


def test_rwkv6_layer():
    """Peng et al. 2024 (2404.05892), equations 14 to 20."""
    mixer = RWKV6(heads=HEADS, mix_rank=3, decay_rank=3)
    p, state, expected = wide(mixer), np.zeros((HEADS, DIM, DIM)), []
    for x, before in tokens():
        low = np.tanh(np.einsum("d,der->er", x + (before - x) * p["mix"], p["mix_in"]))
        mixes = p["mixes"] + np.einsum("er,erd->ed", low, p["mix_out"])
        xr, xk, xv, xg, xw = x + (before - x) * mixes
        r, k, v, g = (
            np.einsum("d,dhe->he", mixed, p[name])
            for mixed, name in ((xr, "receptance"), (xk, "key"), (xv, "value"), (xg, "gate"))
        )
        w = np.exp(-np.exp(p["decay"] + low_rank(p, "decay", np.tanh(xw @ p["decay_in"]))))
        write = k[:, :, None] * v[:, None, :]
        o = np.einsum("hk,hkv->hv", r, state + p["bonus"][:, :, None] * write)
        state = w[:, :, None] * state + write
        expected.append(np.einsum("he,hed->d", group_norm(o, p) * g * sigmoid(g), p["out"]))
    assert relative(layer(mixer), np.stack(expected)) < TOLERANCE


def test_rwkv7_layer():
    """Peng et al. 2025 (2503.14456), section 4, without the mixing of values over layers."""
    mixer = RWKV7(heads=HEADS, decay_rank=3, rate_rank=3, gate_rank=3)
    p, state, expected = wide(mixer), np.zeros((HEADS, DIM, DIM)), []
    for x, before in tokens():
        mixed = {name[:-4]: x + (before - x) * mix for name, mix in p.items() if name.endswith("_mix")}
        r, k, v = (np.einsum("d,dhe->he", mixed[name], p[name]) for name in ("receptance", "key", "value"))

        w = np.exp(
            -math.exp(-0.5) * sigmoid(p["decay"] + low_rank(p, "decay", np.tanh(mixed["decay"] @ p["decay_in"])))
        )
        a = sigmoid(p["rate"] + low_rank(p, "rate", mixed["rate"] @ p["rate_in"]))
        g = low_rank(p, "gate", sigmoid(mixed["gate"] @ p["gate_in"]))
        n = k * p["remove"]
        n = n / np.linalg.norm(n, axis=-1, keepdims=True)
        k = k * (1 + (a - 1) * p["replace"])
        transition = np.stack([np.diag(w[h]) - np.outer(a[h] * n[h], n[h]) for h in range(HEADS)])
        state = transition @ state + k[:, :, None] * v[:, None, :]
        o = group_norm(np.einsum("hk,hkv->hv", r, state), p) + (r * k * p["bonus"]).sum(-1, keepdims=True) * v
        expected.append(np.einsum("he,hed->d", o * g, p["out"]))
    assert relative(layer(mixer), np.stack(expected)) < TOLERANCE


def test_wkv7_over_several_chunks():
    """150 tokens are more than two of the spans between the states that the gradient keeps; documents and padding."""
    random = np.random.default_rng(4)
    r, k, v, n, a = (random.standard_normal((1, 150, 2, 4)).astype(np.float32) for _ in range(5))
    n, a = n / np.linalg.norm(n, axis=-1, keepdims=True), sigmoid(a)
    g = -np.exp(random.standard_normal((1, 150, 2, 4)) - 2).astype(np.float32)
    segments = np.int32([[0] * 60 + [-1] * 10 + [0] * 20 + [1] * 60])
    weight = random.standard_normal(v.shape).astype(np.float32)

    def loss(value):
        out, state = wkv7(r, g, k, value, n, a, segments)
        return (out * weight).sum(), (out, state)

    (_, (out, state)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(v)
    expected, memory, last = np.zeros(v.shape), np.zeros((2, 4, 4)), 0
    reads = np.zeros((150, 150, 2))  # how much of each value each output holds
    carried = np.zeros((150, 2, 4))
    for t in range(150):
        if segments[0, t] < 0:
            continue
        if segments[0, t] != last:
            memory, carried, last = 0 * memory, 0 * carried, segments[0, t]
        for h in range(2):
            transition = np.diag(np.exp(np.float64(g[0, t, h]))) - np.outer(a[0, t, h] * n[0, t, h], n[0, t, h])
            memory[h] = transition @ memory[h] + np.outer(k[0, t, h], v[0, t, h])
            carried[:, h] = carried[:, h] @ transition.T
            carried[t, h] = k[0, t, h]
            expected[0, t, h] = memory[h].T @ r[0, t, h]
            reads[t, :, h] = carried[:, h] @ r[0, t, h]
    assert relative(out, expected) < TOLERANCE
    assert relative(state[0], memory) < TOLERANCE
    assert relative(gradient[0], np.einsum("tsh,thv->shv", reads, weight[0])) < TOLERANCE
