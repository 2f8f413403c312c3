"""The causal convolution against a numpy float64 loop, jax.lax's convolution and laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_convolution import causal_convolution
from tests.evidence import evidence
from tests.kernels.recurrence import IDS, slopes, with_gradients, worst

EXACT = 1e-13  # float64 rounding of sums over 4 taps, of gradients over 42 tokens
SHORT = np.array([[-1] * 4 + [0], [0] + [-1] * 4, [0, -1, 0, -1, 1], [-1] * 5], np.int32)
"""Fewer tokens than taps, left, right and within; a segment's first token at the end; none at all."""


def arrays(ids, taps=4, width=3):
    """x, kernel, bias, initial state; NaN where absent."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*ids.shape, width))
    x[ids < 0] = np.nan
    state = rng.standard_normal((ids.shape[0], taps - 1, width))
    return x, rng.standard_normal((taps, width)), rng.standard_normal(width), state


def run(ids):
    return lambda x, kernel, bias, state: causal_convolution(x, kernel, bias, initial_state=state, segment_ids=ids)


def loop(ids):
    """A window of inputs, moved on by each present token and emptied before each new segment."""

    def function(x, kernel, bias, state):
        y, window = np.zeros(x.shape), np.array(state)
        for b in range(x.shape[0]):
            last = None
            for t in range(x.shape[1]):
                if ids[b, t] < 0:
                    continue
                if last is not None and ids[b, t] != last:
                    window[b] = 0
                last = ids[b, t]
                seen = np.concatenate([window[b], x[b, t : t + 1]])
                y[b, t], window[b] = np.sum(kernel * seen, axis=0) + bias, seen[1:]
        return y, window

    return function


@functools.cache
def in_float64(case):
    """Results and gradients."""
    ids = {"long": IDS, "short": SHORT}[case]
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, with_gradients(run(ids))(*arrays(ids)))


@evidence("B09", oracle="numpy float64 loop over tokens", code="pallas_kernels.causal_convolution")
@pytest.mark.parametrize(("case", "ids"), [("long", IDS), ("short", SHORT)], ids=["long", "short"])
def test_packed_and_padded(case, ids, evidence):
    """Results by the loop; gradients by its central differences, whose own error is about 1e-9."""
    results, gradients = in_float64(case)
    evidence.record(worst(results, loop(ids)(*arrays(ids))), EXACT)
    for gradient, (direction, slope) in zip(gradients, slopes(loop(ids), arrays(ids)), strict=True):
        evidence.record(abs(np.sum(gradient * direction) - slope), 1e-7)
    assert not gradients[0][ids < 0].any()


@evidence("B09", oracle="jax.lax.conv_general_dilated, output and gradients", code="pallas_kernels.causal_convolution")
def test_agrees_with_lax(evidence):
    """Float32: sums over 4 taps, in gradients over 26 tokens. The state is the padding on the left."""
    x, kernel, bias, state = (jnp.asarray(v, jnp.float32) for v in arrays(np.zeros((2, 13), int)))

    def theirs(x, kernel, bias, state):
        inputs = jnp.concatenate([state, x], axis=1)
        dimensions = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            inputs, kernel[:, None], (1,), "VALID", dimension_numbers=dimensions, feature_group_count=3
        )
        return y + bias, inputs[:, -3:]

    ours = jax.tree.leaves(with_gradients(run(None))(x, kernel, bias, state))
    evidence.record(worst(ours, jax.tree.leaves(with_gradients(theirs)(x, kernel, bias, state))), 2e-6)


@evidence("B09", oracle="law: parts with carried state, packing", code="pallas_kernels.causal_convolution")
def test_parts_and_packing(evidence):
    """Float64. Results and gradients of a sequence in parts, one of them shorter than the taps, and of packed rows."""
    x, kernel, bias, _ = arrays(np.zeros((2, 13), int))

    def parts(x, kernel, bias):
        outs, state = [], None
        for part in (slice(0, 2), slice(2, 3), slice(3, 13)):
            y, state = causal_convolution(x[:, part], kernel, bias, initial_state=state)
            outs.append(y)
        return jnp.concatenate(outs, axis=1), state

    def packed(x, kernel, bias):
        ids = np.arange(2).repeat(13)[None]
        row = x.reshape(1, 26, 3)
        y, last = causal_convolution(row, kernel, bias, segment_ids=ids)
        _, first = causal_convolution(row, kernel, bias, segment_ids=np.where(ids == 0, 0, -1))
        return y.reshape(2, 13, 3), jnp.concatenate([first, last])

    with jax.enable_x64(True):
        expected = jax.tree.leaves(with_gradients(causal_convolution)(x, kernel, bias))
        for law in (parts, packed):
            evidence.record(worst(jax.tree.leaves(with_gradients(law)(x, kernel, bias)), expected), EXACT)


@evidence("B09", oracle="float64 sums of the rounded inputs", code="pallas_kernels.causal_convolution")
def test_bfloat16_sums_in_float32(evidence):
    """RMS error at most 1.3 times that of rounding the exact result once."""
    rounded = [jnp.asarray(v, jnp.bfloat16) for v in arrays(IDS)]
    exact, last = loop(IDS)(*(np.asarray(v, np.float64) for v in rounded))
    y, final = jax.jit(run(IDS))(*rounded)
    assert y.dtype == final.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(final, np.float64), last)
    rms = lambda v: np.sqrt(np.mean((np.asarray(v, np.float64) - exact) ** 2))
    evidence.record(rms(y), 1.3 * rms(jnp.asarray(exact, jnp.bfloat16)))


def test_one_tap_has_no_state():
    x, kernel, ids = np.arange(6, dtype=np.float32).reshape(1, 3, 2), np.full((1, 2), 2.0), np.array([[0, -1, 1]])
    y, state = jax.jit(lambda *arrays: causal_convolution(*arrays, segment_ids=ids))(x, kernel)
    assert np.array_equal(y[0], [[0, 2], [0, 0], [8, 10]])
    assert state.shape == (1, 0, 2)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"x has shape \(2, 4\)", {"x": np.ones((2, 4))}),
        ("x of shape .* dtype int32", {"x": np.ones((2, 4, 3), np.int32)}),
        (r"kernel has shape \(4, 2\), x \(2, 4, 3\)", {"kernel": np.ones((4, 2))}),
        (r"bias has shape \(2,\), x \(2, 4, 3\)", {"bias": np.ones(2)}),
        (r"initial_state has shape \(2, 4, 3\), x \(2, 4, 3\), kernel \(4, 3\)", {"initial_state": np.ones((2, 4, 3))}),
        (r"segment_ids has shape \(2, 3\), x \(2, 4, 3\)", {"segment_ids": np.zeros((2, 3), int)}),
    ],
)
def test_errors(message, options):
    with pytest.raises(ValueError, match=message):
        causal_convolution(**{"x": np.ones((2, 4, 3)), "kernel": np.ones((4, 3))} | options)
