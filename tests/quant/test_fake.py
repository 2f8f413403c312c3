"""Training against rounding: values, gradients, and one model that trains so."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.decoder import Decoder
from llmjax.quant.fake import clipped, fake_quantise, initial_step, learned_step, noise_penalty
from llmjax.quant.formats import rounded
from llmjax.quant.integers import Integer
from llmjax.quant.nf4 import NF4
from llmjax.quant.qat import fake_quantised, noise, round_inputs
from llmjax.quant.quantize import Quantize, quantise
from llmjax.quant.report import memory
from tests.evidence import evidence


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@evidence(
    "H14",
    oracle="law: the gradient upstream in range, zero where clipped; plain rounding has none",
    code="llmjax.quant.fake",
)
def test_straight_through(evidence):
    w, upstream = normal(4, 16), normal(4, 16, seed=1)
    value, gradient = jax.jit(jax.value_and_grad(lambda w: jnp.sum(fake_quantise(w, NF4(block=8)) * upstream)))(w)
    evidence.record(np.abs(gradient - upstream).max(), 0)
    np.testing.assert_allclose(value, np.sum(rounded(w, NF4(block=8)) * upstream), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(clipped(w, 0.1) * upstream)))(w)
    inside = (np.round(w / 0.1) >= -8) & (np.round(w / 0.1) <= 7)
    evidence.record(np.abs(gradient - np.where(inside, upstream, 0)).max(), 0)
    assert inside.any()
    assert not inside.all()
    assert not np.any(jax.jit(jax.grad(lambda w: jnp.sum(jnp.round(w))))(w))


@evidence("H14", oracle="the paper's gradients of the step, number by number", code="llmjax.quant.fake")
def test_learned_step(evidence):
    """Sums of 64 terms."""
    x, step, top = normal(64), 0.2, 7
    upstream = normal(64, seed=1)

    def loss(x, step):
        return jnp.sum(learned_step(x, step) * upstream)

    dx, ds = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, jnp.asarray(step))
    v = x.astype(np.float64) / step
    inside = (v > -8) & (v < top)
    slope = np.where(inside, np.round(v) - v, np.clip(v, -8, top))
    evidence.record(abs(float(ds) - np.sum(slope * upstream) / np.sqrt(64 * top)), 1e-5)
    np.testing.assert_allclose(dx, np.where(inside, upstream, 0), atol=1e-6)
    np.testing.assert_allclose(learned_step(x, jnp.asarray(step)), np.clip(np.round(v), -8, 7) * step, atol=1e-6)
    assert float(initial_step(jnp.asarray(x))) == pytest.approx(2 * np.abs(x).mean() / np.sqrt(7), rel=1e-6)


@evidence("H15", oracle="worked numbers: step 0.018, 2 (w - Q(w)); zero on the grid", code="llmjax.quant.fake")
def test_noise_penalty(evidence):
    """The first weight sets the step."""
    w, form = jnp.asarray([[7 * 0.018, 0.0534, 0.01, -0.07]]), Integer(block=4)
    gradient = jax.jit(jax.grad(lambda w: noise_penalty(w, form)))(w)
    evidence.record(np.abs(gradient - np.asarray([[0, -0.0012, -0.016, 0.004]])).max(), 1e-7)
    mean = jax.jit(jax.grad(lambda w: noise_penalty(w, form, mean=True)))(w)
    np.testing.assert_allclose(mean, gradient / 4, rtol=1e-6)
    assert float(noise_penalty(rounded(w, form), form)) < 1e-15


@pytest.mark.adapters
@evidence(
    "H14", oracle="law: what is computed in training is what the quantised model computes", code="llmjax.quant.qat"
)
def test_a_model_trained_against_rounding(evidence):
    """The same products from packed codes and from rounded weights; and descent lowers the loss at 3 bits."""
    model, config = Decoder(vocab=17, d_model=16, layers=2, unroll=1), Quantize(format=Integer(bits=3, block=8))
    module, params = model.build(), model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 17, (4, 12))

    def loss(params):
        logits = module.apply({"params": params}, tokens[:, :-1])[0]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))

    def trained(params):
        return loss(fake_quantised(model, params, config))

    step = jax.jit(lambda params: jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(trained)(params)))
    before = float(jax.jit(loss)(quantise(model, params, config)))
    evidence.record(abs(before - float(jax.jit(trained)(params))), 1e-6)
    for _ in range(12):
        params = step(params)
    assert float(jax.jit(loss)(quantise(model, params, config))) < before - 0.1
    sums, means = (float(noise(model, params, config, mean=mean)) for mean in (False, True))
    weights = memory(quantise(model, params, config)).quantised_weights
    assert sums / means == pytest.approx(weights, rel=1e-5)


def test_inputs_are_rounded_by_an_interceptor():
    """A scale for each token of each projection: at 8 bits little changes, at 2 bits much."""
    model = Decoder(vocab=17, d_model=16, layers=1)
    module, params, tokens = model.build(), model.init(jax.random.key(0)), np.arange(12)[None]

    def logits(bits):
        with nn.intercept_methods(round_inputs(bits)):
            return jax.jit(lambda params: module.apply({"params": params}, tokens)[0])(params)

    exact = jax.jit(lambda params: module.apply({"params": params}, tokens)[0])(params)
    apart = {bits: float(jnp.abs(logits(bits) - exact).max()) for bits in (8, 2)}
    assert 0 < apart[8] < 0.02 * float(jnp.abs(exact).max())
    assert apart[2] > 10 * apart[8]
