"""Normalisations against flax.linen and their invariances; float32 rounding of means over 16 features."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.nn.norms import LayerNorm, RMSNorm
from tests.evidence import evidence

X = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (2, 5, 16))
SCALE, SHIFT = jax.random.normal(jax.random.key(1), (2, 16))


def run(config, params, x=X):
    return config.build().apply({"params": params}, x)


@evidence("A30", oracle="flax.linen.LayerNorm", code="llmjax.nn.norms")
def test_layer_norm_agrees_with_flax(evidence):
    params = {"scale": SCALE, "bias": SHIFT}
    expected = nn.LayerNorm(epsilon=1e-3).apply({"params": params}, X)
    evidence.record(jnp.max(jnp.abs(run(LayerNorm(eps=1e-3), params) - expected)), 5e-6)


@evidence("A31", oracle="flax.linen.RMSNorm", code="llmjax.nn.norms")
def test_rms_norm_agrees_with_flax(evidence):
    expected = nn.RMSNorm(epsilon=1e-3).apply({"params": {"scale": SCALE}}, X)
    evidence.record(jnp.max(jnp.abs(run(RMSNorm(eps=1e-3), {"scale": SCALE}) - expected)), 5e-6)


def test_invariances():
    layer, rms = {"scale": SCALE}, {"scale": SCALE}
    plain = LayerNorm(eps=0.0, bias=False)
    chex.assert_trees_all_close(run(plain, layer), run(plain, layer, 7.0 * X + 11.0), atol=1e-4)
    chex.assert_trees_all_close(run(RMSNorm(eps=0.0), rms), run(RMSNorm(eps=0.0), rms, 7.0 * X), atol=1e-5)


def test_statistics_are_float32_in_bfloat16():
    """256 features at 100 with a spread of 1: a bfloat16 mean would lose the spread."""
    x = (100 + jax.random.normal(jax.random.key(2), (4, 256))).astype(jnp.bfloat16)
    y = LayerNorm(bias=False).build().apply({"params": {"scale": jnp.ones(256)}}, x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=2**-7 * 4)
