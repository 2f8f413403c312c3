"""Rotary embedding: a complex-number oracle in NumPy and the laws it is made for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.rope import Rope, rotate
from tests.evidence import evidence

POSITIONS = jnp.asarray([[0, 1, 5, 100], [3, 2, 1, 0]])
LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])


def heads():
    return jax.random.normal(jax.random.key(0), (2, 4, 3, 8))


@evidence("A29", oracle="complex multiplication in float64", code="llmjax.nn.rope")
@LAYOUTS
def test_planes_turn_like_complex_numbers(layout, evidence):
    x = np.asarray(heads(), np.float64)
    low, high = (x[..., :4], x[..., 4:]) if layout == "half" else (x[..., 0::2], x[..., 1::2])
    angles = np.asarray(POSITIONS)[:, :, None, None] * 500.0 ** (-np.arange(4) / 4)
    turned = (low + 1j * high) * np.exp(1j * angles)
    ours = np.asarray(rotate(heads(), POSITIONS, Rope(500.0, layout)))
    a, b = (ours[..., :4], ours[..., 4:]) if layout == "half" else (ours[..., 0::2], ours[..., 1::2])
    evidence.record(np.abs(a + 1j * b - turned).max(), 2e-5)  # float32 angles up to 100 radians: 100 * 2^-24 each


@LAYOUTS
def test_scores_depend_on_differences_only(layout):
    q, k = heads()[:1], heads()[1:]
    config = Rope(layout=layout)

    def score(shift):
        where = POSITIONS[:1] + shift
        return jnp.einsum("blhd,bmhd->bhlm", rotate(q, where, config), rotate(k, where, config))

    chex.assert_trees_all_close(score(0), score(37), atol=1e-4)


@LAYOUTS
def test_norm_is_kept_and_position_zero_is_the_identity(layout):
    x = heads()
    turned = rotate(x, POSITIONS, Rope(layout=layout))
    chex.assert_trees_all_close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])


def test_bfloat16_keeps_float32_angles():
    """At position 1e6 the angle must not be rounded to 8 bits: only the result is."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    where = jnp.asarray([[1_000_003]])
    turned = rotate(x, where, Rope()).astype(jnp.float32)
    angle = np.float64(1_000_003)
    expected = [np.cos(angle) - np.sin(angle), np.cos(angle) + np.sin(angle)]
    np.testing.assert_allclose(turned[0, 0, 0], expected, atol=2 * 2**-8)
