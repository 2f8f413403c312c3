"""Initial weights have the standard deviations that their schemes state."""

import jax
import numpy as np
import pytest

from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import FanInInit, GPT2Init, LlamaInit
from tests.evidence import evidence

RESIDUAL = ("out", "down")


@evidence("A38", oracle="standard deviations of Radford et al. 2019 and LLaMA", code="llmjax.nn.initializers")
@pytest.mark.parametrize("scheme", [GPT2Init(0.05), LlamaInit(0.05)], ids=["gpt2", "llama"])
def test_normal_schemes(scheme, evidence):
    model = Decoder(vocab=512, d_model=256, layers=4, pattern=(Block(),), initializer=scheme)
    scale = 1 / np.sqrt(2 * 4) if isinstance(scheme, GPT2Init) else 1.0
    for path, leaf in jax.tree.leaves_with_path(model.init(jax.random.key(0))):
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            np.testing.assert_array_equal(leaf, 1.0)
            continue
        expected = 0.05 * (scale if names[-2] in RESIDUAL else 1.0)
        evidence.record(abs(np.std(leaf) / expected - 1), 0.02)


def test_fan_in_keeps_the_variance_and_starts_as_the_identity():
    model = Decoder(vocab=512, d_model=256, layers=2, initializer=FanInInit(gain=2.0, embedding_std=0.1))
    params = model.init(jax.random.key(0))
    block = params["blocks"]["0"]
    np.testing.assert_allclose(np.var(block["mixer"]["query"]["kernel"]) * 256, 2.0, rtol=0.02)
    np.testing.assert_allclose(np.std(params["embed"]["embedding"]), 0.1, rtol=0.02)
    for name, projection in (("mixer", "out"), ("mlp", "down")):
        np.testing.assert_array_equal(block[name][projection]["kernel"], 0.0)


def test_layers_are_drawn_independently():
    kernel = Decoder(layers=2).init(jax.random.key(0))["blocks"]["0"]["mixer"]["query"]["kernel"]
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.05
