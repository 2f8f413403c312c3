"""GPT-3: its banded layers, its first weights and its recipe's schedule, against what the paper says."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.pods.gpt3_175b import LENGTH, experiment
from llmjax.models.gpt3 import gpt3
from llmjax.nn.positions import LearnedPositions
from tests.evidence import evidence


def small(band):
    """Two layers of width 24, one banded."""
    config = gpt3("125M", band)
    pattern = tuple(replace(block, mixer=replace(block.mixer, heads=2)) for block in config.pattern)
    return replace(config, layers=2, d_model=24, vocab=17, pattern=pattern, positions=LearnedPositions(16))


@pytest.mark.slow
@evidence("D03", oracle="law: a band as wide as the row is dense", code="llmjax.models.gpt3")
def test_every_other_layer_is_banded(evidence):
    """A band as wide as the row is dense; a narrow one changes all tokens that have more behind them, and no other."""
    tokens = np.random.default_rng(0).integers(0, 17, (2, 16)).astype(np.int32)
    params = small(4).init(jax.random.key(0))
    params = jax.tree.map(lambda x: x * 20 if x.ndim > 2 else x, params)

    def logits(config):
        return np.asarray(config.build().apply({"params": params}, tokens)[0])

    dense = replace(small(4), pattern=(small(4).pattern[0],) * 2)
    whole, narrow, plain = logits(small(16)), logits(small(4)), logits(dense)
    evidence.record(np.abs(whole - plain).max() / np.abs(plain).max(), 1e-6)
    assert np.abs(narrow - plain)[:, :4].max() < 1e-5 * np.abs(plain).max()
    assert (np.abs(narrow - plain)[:, 4:].max(axis=(0, 2)) > 1e-4 * np.abs(plain).max()).all()


@evidence("D03", oracle="6e-5 after 375M tokens, a tenth of it from 260B on", code="llmjax.train.schedules.Cosine")
def test_schedule_of_the_recipe(evidence):
    """Read off at the update in which a number of tokens is reached; warmup and ramp end between updates."""
    recipe = experiment()

    def rate(step):
        return recipe.optimizer.schedule.value(step, recipe.train.steps)

    ramp = recipe.train.ramp.microbatches(recipe.data.batch_size, recipe.train.accumulate)
    per = recipe.data.batch_size // recipe.train.accumulate * LENGTH
    tokens = np.cumsum(np.concatenate([ramp, np.full(recipe.train.steps - len(ramp), ramp[-1])])) * per
    batch = recipe.data.batch_size * LENGTH
    assert 3.1e6 < batch < 3.2e6
    assert 300e9 <= tokens[-1] < 300e9 + batch
    warm, low = np.searchsorted(tokens, 375e6) + 1, np.searchsorted(tokens, 260e9) + 1
    middle = (warm + low) // 2
    found = [rate(0), rate(warm // 2), rate(warm), rate(middle), rate(low), rate(recipe.train.steps)]
    evidence.record(np.abs(np.divide(found, 6e-5) - [0, 0.5, 1, 0.55, 0.1, 0.1]).max(), 2e-3)


def test_first_weights():
    """Normal of 0.02; what writes into the residual stream over sqrt(2 layers) of it (Radford et al. 2019)."""
    config = replace(gpt3("125M"), vocab=64, layers=4, d_model=192)
    params = config.init(jax.random.key(0))
    block = params["blocks"]["1"]
    assert math.isclose(np.std(block["mixer"]["query"]["kernel"]), 0.02, rel_tol=0.01)
    for kernel in (block["mixer"]["out"]["kernel"], block["mlp"]["down"]["kernel"]):
        assert math.isclose(np.std(kernel), 0.02 / math.sqrt(8), rel_tol=0.01)
