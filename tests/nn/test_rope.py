"""Rotary embedding: a complex-number oracle in NumPy and the laws it is made for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError, validate
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.rope_scaling import NTK, LongRoPE
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


@evidence("A29", oracle="identity of the features left out; plain rotation of the others", code="llmjax.nn.rope")
@LAYOUTS
def test_partial_rotation_is_rotation_of_the_first_features(layout, evidence):
    """Six of eight features turn as a head of six does, bit for bit; the others are what they were."""
    turned = rotate(heads(), POSITIONS, Rope(layout=layout, fraction=0.75))
    alone = rotate(heads()[..., :6], POSITIONS, Rope(layout=layout))
    expected = jnp.concatenate([alone, heads()[..., 6:]], axis=-1)
    evidence.record(jnp.abs(turned - expected).max(), 0.0)


@evidence("A29", oracle="complex multiplication in float64, one position an axis", code="llmjax.nn.rope")
@LAYOUTS
def test_sections_turn_by_the_position_of_their_axis(layout, evidence):
    config = Rope(500.0, layout, sections=(2, 1, 1))
    where = np.random.default_rng(0).integers(0, 100, (2, 4, 3))
    angles = np.stack([where[..., 0], where[..., 0], where[..., 1], where[..., 2]], axis=-1) * 500.0 ** (
        -np.arange(4) / 4
    )
    x = np.asarray(heads(), np.float64)
    low, high = (x[..., :4], x[..., 4:]) if layout == "half" else (x[..., 0::2], x[..., 1::2])
    turned = (low + 1j * high) * np.exp(1j * angles)[:, :, None]
    ours = np.asarray(rotate(heads(), jnp.asarray(where), config))
    a, b = (ours[..., :4], ours[..., 4:]) if layout == "half" else (ours[..., 0::2], ours[..., 1::2])
    evidence.record(np.abs(a + 1j * b - turned).max(), 2e-5)  # float32 angles up to 100 radians: 100 * 2^-24 each


def test_text_has_the_same_position_on_all_axes():
    """Then sections change nothing, and one position for each token will do."""
    config = Rope(sections=(2, 1, 1))
    plain = rotate(heads(), POSITIONS, Rope())
    np.testing.assert_array_equal(rotate(heads(), POSITIONS, config), plain)
    np.testing.assert_array_equal(rotate(heads(), jnp.stack([POSITIONS] * 3, axis=-1), config), plain)
    with pytest.raises(ValueError, match="positions with 2 axes need as many"):
        rotate(heads(), jnp.stack([POSITIONS] * 2, axis=-1), config)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (Rope(base=1.0), "base"),
        (Rope(fraction=0.0), "fraction"),
        (Rope(fraction=1.5), "fraction"),
        (Rope(sections=()), "sections"),
        (Rope(sections=(4, 0)), "sections"),
        (Rope(scaling=NTK(0.5)), "scaling.factor"),
    ],
)
def test_problems(config, field):
    with pytest.raises(ConfigError, match=rf"^{field}\b"):
        validate(config)


@pytest.mark.parametrize(
    ("config", "head_dim", "field"),
    [
        (Rope(), 9, "fraction"),
        (Rope(fraction=0.3), 8, "fraction"),
        (Rope(fraction=0.01), 8, "fraction"),
        (Rope(sections=(2, 1)), 8, "sections"),
        (Rope(scaling=LongRoPE((1.0,) * 3, (2.0,) * 3)), 8, "scaling.short"),
    ],
)
def test_problems_with_a_head(config, head_dim, field):
    assert next(found for found, _ in config.problems_at(head_dim)) == field
    assert list(Rope(fraction=0.4, sections=(8, 4, 4)).problems_at(80)) == []
