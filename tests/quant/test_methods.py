"""Post-training methods on single matrices: what they must equal before rounding, and what they must win after."""

from dataclasses import replace
from itertools import product as every

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llmjax.config import InputError, validate
from llmjax.fields import ConfigError
from llmjax.quant.allocation import Cost, allocate
from llmjax.quant.awq import AWQ, search
from llmjax.quant.calibrate import statistics_of
from llmjax.quant.formats import rounded
from llmjax.quant.gptq import GPTQ, factor
from llmjax.quant.integers import Integer
from llmjax.quant.method import RTN, Statistics
from llmjax.quant.nf4 import NF4
from llmjax.quant.outliers import outlier_fractions
from llmjax.quant.quantize import matrices
from llmjax.quant.rotation import Rotated
from llmjax.quant.smooth import SmoothQuant, fold, smoothing
from llmjax.quant.tensor import Layout
from tests.evidence import evidence

pytestmark = pytest.mark.adapters


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def correlated(rows, inputs, rho, seed=1):
    """Inputs of unit variance of which each pair correlates by rho."""
    return np.sqrt(1 - rho) * normal(rows, inputs, seed=seed) + np.sqrt(rho) * normal(rows, 1, seed=seed + 1)


def output_error(x, w, tensor):
    """|X (W - W')|^2 / |X W|^2."""
    return float(np.square(x @ (w - np.asarray(tensor.dense()))).sum() / np.square(x @ w).sum())


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


def brain_surgeon(w, hessian, step, top):
    """Optimal brain quantisation in float64 with a fixed order: fix a row, solve for the free rows, go on.

    After row i is fixed at q, the free rows minimise (w' - w)^T H (w' - w): w_F + H_FF^-1 H_Fi (w_i - q), all earlier
    corrections standing.
    """
    w = w.astype(np.float64).copy()
    for i in range(len(w)):
        q = np.clip(np.round(w[i] / step), -top, top) * step
        free = slice(i + 1, None)
        if i + 1 < len(w):
            w[free] += np.linalg.solve(hessian[free, free], np.outer(hessian[free, i], w[i] - q))
        w[i] = q
    return w


@evidence(
    "H19",
    oracle="optimal brain quantisation in float64, a least-squares problem for each input",
    code="llmjax.quant.gptq",
)
@pytest.mark.parametrize("chunk", [4, 128])
def test_gptq_is_optimal_brain_quantisation(evidence, chunk):
    """Rounding may tip where a weight lies half-way; none here does. No chunk changes the result."""
    w, x = normal(6, 5), correlated(50, 6, 0.8)
    form, layout = Integer(block="channel"), Layout((6,), (5,))
    seen = statistics_of(x)
    got = matrices(w, seen, form, GPTQ(chunk=chunk), layout).dense()
    hessian = np.asarray(seen.gram, np.float64)
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(6)
    want = brain_surgeon(w, hessian, np.abs(w).max(0) / 7, 7)
    evidence.record(np.abs(got - want).max(), 1e-6)
    upper = np.asarray(factor(seen.gram, 0.01))
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(hessian), rtol=1e-3, atol=1e-4)
    assert not np.any(np.tril(upper, -1))


@evidence("H19", oracle="law: with uncorrelated inputs it is rounding to the nearest", code="llmjax.quant.gptq")
@pytest.mark.parametrize("form", [NF4(block=8), Integer(block="tensor"), Integer(zero_point="real", block=16)], ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_without_correlation(evidence, form, act_order):
    """With act-order, groups are of other inputs, so only formats without groups stay the same."""
    w, layout = normal(16, 6), Layout((16,), (6,))
    variances = np.arange(1, 17) % 5 + 1.0
    seen = Statistics(jnp.diag(jnp.asarray(variances, jnp.float32)), jnp.ones(16), jnp.ones(16))
    got = matrices(w, seen, form, GPTQ(act_order=act_order), layout)
    if act_order and form.block != "tensor":
        order = np.argsort(-variances, kind="stable")
        np.testing.assert_array_equal(got.order, order)
        want = np.empty_like(w)
        want[order] = matrices(w[order], None, form, RTN(), layout).dense()
    else:
        want = matrices(w, None, form, RTN(), layout).dense()
    evidence.record(np.abs(got.dense() - want).max(), 1e-6)


@evidence(
    "H19", oracle="output errors of rounding and of GPTQ by numpy, at three correlations", code="llmjax.quant.gptq"
)
@pytest.mark.parametrize(
    ("rho", "nearest", "gptq"), [(0.3, 0.0206, 0.0144), (0.6, 0.0231, 0.0094), (0.9, 0.0261, 0.0025)]
)
def test_gptq_wins_on_correlated_inputs(evidence, rho, nearest, gptq):
    """64 inputs and outputs, 1,000 rows, INT4 with one scale. Another draw of W moves the scale, hence both errors."""
    w, x = normal(64, 64), correlated(1000, 64, rho)
    layout, form, seen = Layout((64,), (64,)), Integer(block="tensor"), statistics_of(x)
    errors = [output_error(x, w, matrices(w, seen, form, method, layout)) for method in (RTN(), GPTQ())]
    evidence.record(abs(np.log(errors[1] / errors[0] / (gptq / nearest))), 0.2)
    ordered = output_error(x, w, matrices(w, seen, form, GPTQ(act_order=True), layout))
    assert ordered < errors[0]


def test_gptq_with_groups_and_dead_inputs():
    """Scales of groups are those of the rows when their turn comes; inputs that are always zero change nothing."""
    w, x = normal(24, 8), correlated(100, 24, 0.7)
    x[:, [3, 17]] = 0
    seen, layout, form = statistics_of(x), Layout((24,), (8,)), Integer(block=12, zero_point="integer")
    methods = (RTN(), GPTQ(), GPTQ(chunk=5))
    errors = [output_error(x, w, matrices(w, seen, form, method, layout)) for method in methods]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] == pytest.approx(errors[1], rel=1e-4)
    with pytest.raises(InputError, match="block=10 does not divide 24"):
        matrices(w, seen, Integer(block=10), GPTQ(), layout)


# ---- scaling of channels, rotation -----------------------------------------------------------------------------------


def outlying(rows=256, inputs=128, seed=3):
    """Inputs of which six channels are twenty times as large."""
    x = normal(rows, inputs, seed=seed)
    x[:, np.random.default_rng(seed).choice(inputs, 6, replace=False)] *= 20
    return x


@evidence(
    "H20",
    oracle="output errors by numpy on six outlying channels: 0.1005, scaled 0.0603",
    code="llmjax.quant.awq",
)
def test_awq_wins_on_outlying_channels(evidence):
    """Relative norms of the error. A draw of its own: the figures of both are within a quarter of the notes'."""
    w, x = normal(128, 64), outlying(512)
    layout, form, seen = Layout((128,), (64,)), Integer(block="channel"), statistics_of(x)
    errors = [
        output_error(x, w, matrices(w, seen, form, method, layout)) ** 0.5 for method in (RTN(), AWQ(clips=1), AWQ())
    ]
    evidence.record(abs(np.log(errors[1] / errors[0] / (0.0603 / 0.1005))), 0.25)
    assert errors[2] <= errors[1]


@evidence(
    "H20",
    oracle="law: (x / s)(s W) = x W; never worse than no scaling; a common factor cancels",
    code="llmjax.quant.awq",
)
def test_awq_laws(evidence):
    w, x = normal(16, 12), outlying(64, 16)
    layout, form, seen = Layout((16,), (12,)), Integer(block=8), statistics_of(x)
    s = search(w.T, seen, form)
    evidence.record(np.abs((x / s) @ (s[:, None] * w) - x @ w).max() / np.abs(x @ w).max(), 1e-6)
    plain, best = (matrices(w, seen, form, method, layout) for method in (RTN(), AWQ(clips=1)))
    assert output_error(x, w, best) <= output_error(x, w, plain)
    np.testing.assert_allclose(best.gain, 1 / s, rtol=1e-5)
    np.testing.assert_allclose(best.dot(jnp.asarray(x), 1), x @ best.dense(), atol=1e-4)
    # a power of two: every scale takes it, and nothing is rounded otherwise
    np.testing.assert_array_equal(rounded(4 * w.T * s, form) / 4, rounded(w.T * s, form))


def test_awq_clips_where_it_pays():
    """One wild weight on an input that hardly matters is given up for the sake of the others."""
    w, x = normal(8, 4), normal(64, 8)
    w[0], x[:, 0] = 5, 1e-3
    layout, form, seen = Layout((8,), (4,)), Integer(bits=3, block="channel"), statistics_of(x)
    whole, clipped = (matrices(w, seen, form, AWQ(grid=1, clips=clips), layout) for clips in (1, 10))
    assert output_error(x, w, clipped) < 0.5 * output_error(x, w, whole)


@evidence(
    "H20",
    oracle="law: a norm's scale over s and kernels times s leave the function as it is",
    code="llmjax.quant.smooth",
)
def test_folding(evidence):
    x, scale, kernels = normal(20, 16), 1 + 0.1 * normal(16), [normal(16, 3, 4), normal(16, 5)]
    s = smoothing(jnp.abs(x).max(0), jnp.abs(kernels[1]).max(1), 0.5)
    (folded,), scaled = fold(s, [scale], kernels)
    for kernel, other in zip(kernels, scaled, strict=True):
        want = np.tensordot(x * scale, kernel, axes=1)
        evidence.record(np.abs(np.tensordot(x * folded, other, axes=1) - want).max() / np.abs(want).max(), 1e-6)


@pytest.mark.parametrize("method", [SmoothQuant(), Rotated(), SmoothQuant(method=Rotated(GPTQ()))], ids=str)
def test_eight_bit_weights_and_activations(method):
    """Outlying channels spoil a token's scale; scaled or rotated they do not."""
    w, x = normal(32, 16), outlying(64, 32)
    layout, seen = Layout((32,), (16,)), statistics_of(x)
    tensor = matrices(w, seen, Integer(bits=8, block="channel"), method, layout, 8)
    got, exact = tensor.dot(jnp.asarray(x), 1), replace(tensor, activations=None).dot(jnp.asarray(x), 1)
    np.testing.assert_allclose(exact, x @ w, atol=0.05 * np.abs(x @ w).max())
    error = np.linalg.norm(got - x @ w) / np.linalg.norm(x @ w)
    plain = matrices(w, None, Integer(bits=8, block="channel"), RTN(), layout, 8)
    reference = np.linalg.norm(plain.dot(jnp.asarray(x), 1) - x @ w) / np.linalg.norm(x @ w)
    assert error <= 0.8 * reference


def test_what_a_method_did_is_undone():
    """Gain, rotation and permutation are undone alike in the dense parameter and in the product."""
    w, x = normal(24, 8), outlying(32, 24)
    layout, seen = Layout((24,), (8,)), statistics_of(x)
    form = Integer(bits=8, block=4, zero_point="real")
    for method in (AWQ(grid=4), Rotated(GPTQ(act_order=True))):
        tensor = matrices(w, seen, form, method, layout)
        np.testing.assert_allclose(tensor.dense(), w, atol=0.1)
        np.testing.assert_allclose(tensor.dot(jnp.asarray(x), 1), x @ tensor.dense(), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "field"), [(GPTQ(damping=0.0), "damping"), (AWQ(grid=0), "grid"), (SmoothQuant(alpha=2.0), "alpha")]
)
def test_bad_methods(method, field):
    with pytest.raises(ConfigError, match=field):
        validate(method)


# ---- bits and outliers -----------------------------------------------------------------------------------------------


@evidence("H22", oracle="enumeration of all choices", code="llmjax.quant.allocation")
@pytest.mark.parametrize("seed", range(4))
def test_allocation_is_the_best_of_all(evidence, seed):
    rng = np.random.default_rng(seed)
    costs = {
        f"layer{i}": {bits: Cost(int(size * bits), float(rng.random() * 4.0**-bits)) for bits in (2, 3, 4, 8)}
        for i, size in enumerate(rng.integers(10, 14, 5))
    }
    budget = int(rng.integers(120, 400))
    found = allocate(costs, budget)
    totals = [
        (sum(cost.error for cost in pick), pick)
        for pick in every(*(options.values() for options in costs.values()))
        if sum(cost.bytes for cost in pick) <= budget
    ]
    evidence.record(abs(sum(costs[name][bits].error for name, bits in found.items()) - min(totals)[0]), 1e-12)
    assert sum(costs[name][bits].bytes for name, bits in found.items()) <= budget


def test_a_budget_below_everything():
    with pytest.raises(InputError, match="below the 20"):
        allocate({"a": {2: Cost(20, 1.0)}}, 19)


@evidence("H21", oracle="normal tail probabilities by scipy, of a mixture", code="llmjax.quant.outliers")
def test_outliers(evidence):
    """Head 1 holds 5 percent of weights five times as wide; 200,000 weights a head leave about 5e-4."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(500, 2, 400)).astype(np.float32)
    w[:, 1] *= np.where(rng.random((500, 400)) < 0.05, 5, 1)
    got = jax.jit(lambda w: outlier_fractions(w, (1.0, 3.0), keep=(1,), relative=False))(w)
    tail = 2 * stats.norm.sf([1.0, 3.0])
    mixed = 0.95 * tail + 0.05 * 2 * stats.norm.sf([0.2, 0.6])
    evidence.record(np.abs(got - np.stack([tail, mixed], 1)).max(), 3e-3)
    spread = np.sqrt(np.mean(np.square(w), axis=(0, 2)))
    want = [[np.mean(np.abs(w[:, head]) > t * spread[head]) for head in (0, 1)] for t in (1.0, 3.0)]
    np.testing.assert_allclose(outlier_fractions(w, (1.0, 3.0), keep=(1,)), want, atol=1e-5)
