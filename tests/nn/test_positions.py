"""Sinusoidal positions: row norm and shift-is-a-rotation (Vaswani et al. 2017); learned positions: a plain lookup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.initializers import GPT2Init
from llmjax.nn.positions import LearnedPositions, SinusoidalPositions, sinusoids
from tests.evidence import evidence


@evidence("A24", oracle="explicit float64 loop over the paper's formula", code="llmjax.nn.positions")
def test_sinusoids_are_the_papers_values(evidence):
    d_model, expected = 6, np.zeros((9, 6))
    for position in range(9):
        for i in range(d_model // 2):
            angle = position / 10000.0 ** (2 * i / d_model)
            expected[position, i], expected[position, d_model // 2 + i] = np.sin(angle), np.cos(angle)
    ours = sinusoids(jnp.arange(9)[None], d_model, 10000.0)[0]
    evidence.record(np.abs(np.asarray(ours) - expected).max(), 1e-6)


def test_rows_have_norm_root_half_width_and_shifts_are_rotations():
    table = np.asarray(sinusoids(jnp.arange(50)[None], 16, 10000.0)[0], np.float64)
    np.testing.assert_allclose(np.linalg.norm(table, axis=-1), np.sqrt(8), rtol=1e-5)
    turns = 3 * 10000.0 ** (-np.arange(8) / 8)
    sin, cos = table[:-3, :8], table[:-3, 8:]
    np.testing.assert_allclose(table[3:, :8], sin * np.cos(turns) + cos * np.sin(turns), atol=1e-5)
    np.testing.assert_allclose(table[3:, 8:], cos * np.cos(turns) - sin * np.sin(turns), atol=1e-5)


def test_sinusoidal_module_holds_no_parameters():
    module = SinusoidalPositions(base=100.0).build(8, GPT2Init())
    positions = jnp.asarray([[0, 3]])
    out, variables = module.init_with_output(jax.random.key(0), positions)
    assert not variables
    np.testing.assert_array_equal(out, sinusoids(positions, 8, 100.0))


def test_learned_positions_look_up_and_refuse_longer_input():
    module = LearnedPositions(4).build(8, GPT2Init())
    table = jnp.arange(32.0).reshape(4, 8)
    out = module.apply({"params": {"embedding": table}}, jnp.asarray([[2, 0, -1]]))
    np.testing.assert_array_equal(out[0], table[jnp.asarray([2, 0, 0])])
    with pytest.raises(ValueError, match="length 5 exceeds the 4 learned positions"):
        module.apply({"params": {"embedding": table}}, jnp.zeros((1, 5), jnp.int32))
