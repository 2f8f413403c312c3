"""Feature maps against the kernels that they estimate: means, closed-form errors and bounds of Choromanski et al. 2020.

Directions are independent (or come in independent orthogonal blocks), so one map with very many of them holds as many
trials as one likes. Five standard errors, which the trials tell themselves, are the tolerance of every mean.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from llmjax.nn.features import Angular, EluPlusOne, Hyperbolic, Positive, Relu, Trigonometric, random_directions
from tests.evidence import evidence

D, BLOCKS = 4, 100_000
X = np.array([0.5, -0.3, 0.2, 0.4])
Y = np.array([-0.1, 0.6, 0.3, -0.5])
Z = X + Y
SOFTMAX = math.exp(X @ Y)
PLUS = math.exp(Z @ Z) * SOFTMAX**2 * (1 - math.exp(-Z @ Z))
ERRORS = {  # mean squared, of the estimate that one direction gives
    "trigonometric": math.exp(Z @ Z) * SOFTMAX**-2 * (1 - math.exp(-(X - Y) @ (X - Y))) ** 2 / 2,
    "positive": PLUS,
    "hyperbolic": PLUS * (1 - math.exp(-Z @ Z)) / 2,
}
KERNELS = {
    "trigonometric": SOFTMAX,
    "gaussian": math.exp(-(X - Y) @ (X - Y) / 2),
    "positive": SOFTMAX,
    "hyperbolic": SOFTMAX,
    "angular": 1 - 2 / math.pi * math.acos(X @ Y / math.sqrt((X @ X) * (Y @ Y))),
    "regularised": math.exp(-(X @ X + Y @ Y) / 2) * scipy.special.hyp0f1(D / 2, D * (Z @ Z) / 4),
}
MAPS = {
    "trigonometric": Trigonometric(),
    "gaussian": Trigonometric(kernel="gaussian"),
    "positive": Positive(),
    "hyperbolic": Hyperbolic(),
    "angular": Angular(),
    "regularised": Positive(regularised=True),
}
EVERY = pytest.mark.parametrize("name", list(KERNELS)[1:])


@functools.cache
def trials(orthogonal):
    """For each map the estimates of all directions by themselves, float64 `[BLOCKS, 4]`: rows are orthogonal blocks."""
    options = dict(count=D * BLOCKS, scale=1.0, orthogonal=orthogonal)
    maps = {name: dataclasses.replace(config, **options) for name, config in MAPS.items()}
    phi = jax.jit(lambda x: {name: config.features(x) for name, config in maps.items()})(np.float32([X, Y]))
    products = {name: np.prod(np.asarray(x, np.float64), axis=0) * D * BLOCKS for name, x in phi.items()}
    return {name: x.reshape(-1, BLOCKS, D).sum(0) for name, x in products.items()}


def standard_error(x):
    return x.std() / math.sqrt(x.size)


def check_mean(evidence, name, orthogonal):
    blocks = trials(orthogonal)[name].mean(1)
    evidence.record(abs(blocks.mean() - KERNELS[name]), 5 * standard_error(blocks))


@pytest.mark.parametrize("orthogonal", [False, True])
@evidence("B02", oracle="exp(x^T y), mean of 4e5 directions", code="llmjax.nn.features.Trigonometric")
def test_trigonometric_features_are_unbiased(orthogonal, evidence):
    check_mean(evidence, "trigonometric", orthogonal)


@EVERY
@evidence("B03", oracle="softmax, Gaussian, angular kernels and 0F1 (scipy), means", code="llmjax.nn.features")
def test_independent_directions_are_unbiased(name, evidence):
    """Regularised features for their own kernel: the mean over a sphere, Lambda 0F1(d/2, d |z|^2 / 4)."""
    check_mean(evidence, name, orthogonal=False)


@EVERY
@evidence("B04", oracle="the kernels, mean of 1e5 orthogonal blocks", code="llmjax.nn.features.random_directions")
def test_orthogonal_directions_are_unbiased(name, evidence):
    """A Q of QR whose columns keep LAPACK's signs is not Haar-distributed, and misses these means."""
    check_mean(evidence, name, orthogonal=True)


def check_error(evidence, name):
    squares = (trials(False)[name] - SOFTMAX) ** 2
    evidence.record(abs(squares.mean() - ERRORS[name]), 5 * standard_error(squares))


@evidence("B02", oracle="closed-form mean squared error (2009.14794, lemma 2)", code="llmjax.nn.features.Trigonometric")
def test_error_of_trigonometric_features(evidence):
    check_error(evidence, "trigonometric")


@pytest.mark.parametrize("name", ["positive", "hyperbolic"])
@evidence("B03", oracle="closed-form mean squared errors (2009.14794, lemma 2)", code="llmjax.nn.features")
def test_error_of_positive_features(name, evidence):
    check_error(evidence, name)


@evidence("B03", oracle="the law 1 / sqrt(m) of a mean of m", code="llmjax.nn.features.Positive")
def test_error_falls_with_the_root_of_the_directions(evidence):
    """400,000 directions in groups of m; the exponent of the root mean squared error over m from 4 to 256."""
    errors = trials(False)["positive"].reshape(-1)[: 256 * 1500] - SOFTMAX
    sizes = [4, 16, 64, 256]
    root = [math.sqrt((errors.reshape(-1, m).mean(1) ** 2).mean()) for m in sizes]
    slope = np.polyfit(np.log(sizes), np.log(root), 1)[0]
    evidence.record(abs(slope + 0.5), 0.03)  # 1,500 groups of 256: 2 % each


@evidence("B04", oracle="bound 2(m-1)/(m(d+2)) (SM - Lambda)^2 (2009.14794, theorem 2)", code="llmjax.nn.features")
def test_orthogonal_directions_have_less_variance(evidence):
    """MSE(orthogonal) <= MSE(independent) - 2 (m - 1) / (m (d + 2)) (SM - e^(-(|x|^2 + |y|^2) / 2))^2, m = d = 4."""
    squares = (trials(True)["positive"].mean(1) - SOFTMAX) ** 2
    gain = 2 * (D - 1) / (D * (D + 2)) * (SOFTMAX - math.exp(-(X @ X + Y @ Y) / 2)) ** 2
    bound = PLUS / D - gain
    evidence.record(max(squares.mean() - bound, 0), 5 * standard_error(squares))
    assert squares.mean() < PLUS / D - 10 * standard_error(squares)


@evidence("B04", oracle="Q Q^T = I, chi lengths (scipy)", code="llmjax.nn.features.random_directions")
def test_orthogonal_blocks(evidence):
    """Rows of a block are orthogonal; lengths have the mean of the chi distribution, or are sqrt(d)."""
    rows = np.asarray(random_directions(jax.random.key(1), 30_000, 6, True, False)).reshape(-1, 6, 6)
    lengths = np.linalg.norm(rows, axis=-1)
    unit = rows / lengths[..., None]
    evidence.record(np.abs(unit @ unit.swapaxes(1, 2) - np.eye(6)).max(), 2e-6)
    mean = math.sqrt(2) * scipy.special.gamma(3.5) / scipy.special.gamma(3)
    assert abs(lengths.mean() - mean) < 5 * standard_error(lengths.reshape(-1))
    cut = np.asarray(random_directions(jax.random.key(1), 8, 6, True, True))
    np.testing.assert_allclose(np.linalg.norm(cut, axis=-1), math.sqrt(6), rtol=1e-6)


@pytest.mark.parametrize(
    "config", [Trigonometric(count=32), Positive(count=32), Hyperbolic(count=32), EluPlusOne(), Relu()]
)
def test_queries_may_lose_a_positive_factor(config):
    """Features of a token and those in range differ by one positive number; long vectors leave no range."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8)), jnp.float32)
    phi, stable = np.asarray(config.features(x)), np.asarray(config.up_to_factor(x))
    assert phi.shape == stable.shape == (5, config.size(8))
    factor = (phi * stable).sum(-1) / (stable**2).sum(-1)
    assert (factor > 0).all()
    np.testing.assert_allclose(phi, factor[:, None] * stable, rtol=2e-5, atol=1e-6)
    long = np.asarray(config.up_to_factor(60 * x))
    assert np.isfinite(long).all()
    assert (np.abs(long).max(-1) > 1e-3).all()


def test_default_scale_is_that_of_softmax_attention():
    x = jnp.asarray(np.stack([X, Y]), jnp.float32)
    ours, plain = Positive(count=8), Positive(count=8, scale=1.0)
    np.testing.assert_allclose(ours.features(x), plain.features(x / 4**0.25), rtol=1e-6)
