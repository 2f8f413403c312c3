"""Retention, GLA, DeltaNet and mLSTM against their papers' equations in numpy float64, and against each other.

Float32 sums of some tens of terms and a normalisation: errors are relative to the largest value, tolerance 2e-5.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.delta_net import DeltaNet, GatedDeltaNet
from llmjax.nn.gla import GLA
from llmjax.nn.linear_attention import linear_attention
from llmjax.nn.mlstm import MLSTM, mlstm
from llmjax.nn.retention import Retention, retnet_decay
from llmjax.nn.rope import Rope, rotate
from pallas_kernels.gated_delta_rule import gated_delta_rule
from tests.evidence import evidence
from tests.mixers.cases import D_MODEL, apply, params_of

TOLERANCE = 2e-5
LENGTH = 14
X = np.random.default_rng(0).standard_normal((1, LENGTH, D_MODEL)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def relative(ours, expected):
    return np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()


def wide(mixer):
    """The mixer's parameters as float64: kernels by their module's name, other leaves as `module.leaf`."""
    found = {}
    for name, leaf in params_of(mixer).items():
        for inner, value in (leaf if isinstance(leaf, dict) else {"kernel": leaf}).items():
            found[name if inner == "kernel" else f"{name}.{inner}"] = np.float64(value)
    return found


def layer(mixer):
    return jax.jit(functools.partial(apply, mixer))(params_of(mixer), X)[0]


def heads(p, name):
    """A projection of `X` into heads, `[length, heads, dim]`."""
    return np.einsum("ld,dhe->lhe", np.float64(X[0]), p[name])


def out(p, z):
    return np.einsum("lhe,hed->ld", z, p["out"])


def layer_norm(z, scale, bias=0.0, eps=1e-5):
    z = z - z.mean(-1, keepdims=True)
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + eps) * scale + bias


def rms_norm(z, scale, eps=1e-6):
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + eps) * scale


@evidence(
    "B13", oracle="numpy float64, the parallel form of the paper written out", code="llmjax.nn.retention.Retention"
)
def test_retention_layer(evidence):
    """Sun et al. 2023 (2307.08621), equations 5 and 8: D_nm = gamma^(n - m), gamma = 1 - 2^(-5 - h)."""
    mixer = Retention(heads=2, head_dim=4, value_dim=6)
    p = wide(mixer)
    q, k = (
        np.asarray(rotate(jnp.float32(heads(p, n)[None]), jnp.arange(LENGTH)[None], Rope()))[0]
        for n in ("query", "key")
    )
    gamma = 1 - 2.0 ** (-5 - np.arange(2))
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    decay = np.where(distance >= 0, gamma[:, None, None] ** np.maximum(distance, 0), 0)
    o = np.einsum("hij,jhv->ihv", np.einsum("ihd,jhd->hij", q, k) / 2 * decay, heads(p, "value"))
    z = layer_norm(o, p["norm.scale"], p["norm.bias"]) * silu(heads(p, "gate"))
    evidence.record(relative(layer(mixer), out(p, z)), TOLERANCE)


def test_retnet_decay():
    np.testing.assert_allclose(np.exp(retnet_decay(3)), [31 / 32, 63 / 64, 127 / 128], rtol=1e-6)


def test_gla_layer():
    """Yang et al. 2023 (2312.06635), section 4.4."""
    mixer = GLA(heads=2, rank=3, temperature=2.0)
    p = wide(mixer)
    decay = np.einsum("ld,dr,rhe->lhe", np.float64(X[0]), p["decay_in"], p["decay_out"]) + p["decay_out.bias"]
    a, q, k, v = sigmoid(decay) ** 0.5, heads(p, "query") / 2, heads(p, "key"), heads(p, "value")
    state, o = np.zeros((2, 4, 8)), []
    for t in range(LENGTH):
        state = a[t][:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
        o.append(np.einsum("hk,hkv->hv", q[t], state))
    z = layer_norm(np.stack(o), p["norm.scale"], p["norm.bias"]) * silu(heads(p, "gate") + p["gate.bias"])
    assert relative(layer(mixer), out(p, z)) < TOLERANCE


def convolved(p, name):
    """silu of the causal convolution; the last tap meets the current token."""
    projected, taps = heads(p, name), p[name + "_taps"]
    padded = np.concatenate([np.zeros((len(taps) - 1, *projected.shape[1:])), projected])
    return silu(sum(taps[w] * padded[w : w + LENGTH] for w in range(len(taps))))


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_delta_net_layer(gated):
    """Yang et al. 2024 (2406.06484), equation 3 (2412.06464, equation 10): a product of matrices I - beta k k^T."""
    config = GatedDeltaNet(heads=4, key_heads=2, key_dim=4, taps=3, negative=True)
    mixer = config if gated else DeltaNet(heads=2)
    p, count = wide(mixer), mixer.heads
    q, k = (np.repeat(unit(convolved(p, n)), 2 if gated else 1, axis=1) for n in ("query", "key"))
    v, q = convolved(p, "value"), q / np.sqrt(q.shape[-1])
    beta, a = (1 + gated) * sigmoid(np.float64(X[0]) @ p["write"]), np.ones((LENGTH, count))
    if gated:
        step = np.log1p(np.exp(np.float64(X[0]) @ p["decay"] + p["decay_bias"]))
        a = np.exp(-np.exp(p["decay_rate"]) * step)
    state, o = np.zeros((count, k.shape[-1], v.shape[-1])), np.zeros(v.shape)
    for t, h in np.ndindex(LENGTH, count):
        erase = np.eye(k.shape[-1]) - beta[t, h] * np.outer(k[t, h], k[t, h])
        state[h] = a[t, h] * erase @ state[h] + beta[t, h] * np.outer(k[t, h], v[t, h])
        o[t, h] = q[t, h] @ state[h]
    z = rms_norm(o, p["norm.scale"]) * (silu(heads(p, "gate")) if gated else 1)
    assert relative(layer(mixer), out(p, z)) < TOLERANCE


def test_the_delta_rule_replaces_what_a_key_held():
    """With orthonormal keys, each used twice, and beta = 1 the state is a dictionary of the last values."""
    random = np.random.default_rng(3)
    keys = np.linalg.qr(random.standard_normal((6, 6)))[0][[0, 1, 2, 3, 2, 0, 1, 3]].astype(np.float32)
    values = random.standard_normal((8, 5)).astype(np.float32)
    k, v = keys[None, :, None], values[None, :, None]
    _, state = jax.jit(gated_delta_rule)(k, k, v, np.ones((1, 8, 1), np.float32))
    np.testing.assert_allclose(keys[4:] @ np.asarray(state[0, 0]), values[4:], atol=5e-6)


def cell(q, k, v, log_input, log_forget):
    """The mLSTM cell without any stabiliser, float64 (Beck et al. 2024, 2405.04517, equations 19 to 27)."""
    memory, written = np.zeros((*k.shape[1:], v.shape[-1])), np.zeros(k.shape[1:])
    h = []
    for t in range(len(q)):
        i, f = np.exp(log_input[t])[:, None], np.exp(log_forget[t])[:, None]
        memory = f[..., None] * memory + i[..., None] * k[t][..., None] * v[t][:, None]
        written = f * written + i * k[t]
        read = np.einsum("hk,hkv->hv", q[t], memory)
        h.append(read / np.maximum(np.abs((q[t] * written).sum(-1, keepdims=True)), 1))
    return np.stack(h)


@pytest.mark.parametrize("soft_cap", [2.0, None])
def test_mlstm_layer(soft_cap):
    mixer = MLSTM(heads=2, soft_cap=soft_cap)
    p = wide(mixer)

    def gate(name):
        y = np.float64(X[0]) @ p[name] + p[name + "_bias"]
        return y if soft_cap is None else soft_cap * np.tanh(y / soft_cap)

    log_forget = np.log(sigmoid(gate("forget")))
    h = cell(heads(p, "query") / 2, heads(p, "key"), heads(p, "value"), gate("input"), log_forget)
    z = layer_norm(h, p["norm_scale"], eps=1e-6) * sigmoid(heads(p, "gate"))
    assert relative(layer(mixer), out(p, z)) < TOLERANCE


@functools.cache
def gates(size):
    """Arrays of one mLSTM of 20 tokens, its input gates between e^-size and e^size."""
    random = np.random.default_rng(6)
    q, k, v = (random.standard_normal((1, 20, 2, 4)).astype(np.float32) for _ in range(3))
    log_input = size * random.uniform(-1, 1, (1, 20, 2)).astype(np.float32)
    return q, k, v, log_input, -np.exp(random.standard_normal((1, 20, 2))).astype(np.float32)


@pytest.mark.parametrize("form", ["chunked", "recurrent", "quadratic"])
@pytest.mark.parametrize("size", [3, 60])
def test_mlstm_stabiliser(size, form):
    """e^60 would leave no digit of what was written before, or no range: float32 keeps both, over two documents.

    An exponent of 60 is good to 4e-6 in float32, and denominators may cancel: 1e-4.
    """
    segments = np.int32([[0] * 9 + [-1] * 3 + [1] * 8])
    ours = jax.jit(functools.partial(mlstm, form=form))(*gates(size), segments)[0]
    for span in (slice(0, 9), slice(12, 20)):
        q, k, v, log_input, log_forget = (np.float64(x[0, span]) for x in gates(size))
        assert relative(ours[0, span], cell(q / 2, k, v, log_input, log_forget)) < 1e-4


def test_mlstm_with_open_gates_is_linear_attention():
    """i = f = 1: C is the sum of k v^T; with positive features the normaliser is theirs where it exceeds 1."""
    q, k, v, *_ = gates(3)
    q, k, zeros = 2 * np.exp(q), np.exp(k), np.zeros(q.shape[:3], np.float32)
    ours, *_ = jax.jit(mlstm)(q, k, v, zeros, zeros)
    expected, _ = jax.jit(linear_attention)(q, k, v)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
