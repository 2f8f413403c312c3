"""Scaled rotary embedding: the laws each rule is made for, and numbers worked out by hand from the papers' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError, validate
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.rope_scaling import NTK, DynamicNTK, Llama3, LongRoPE, PositionInterpolation, YaRN, plain_frequencies
from tests.evidence import evidence

BASE, PLANES = 10_000.0, 64
ROW = jnp.zeros((1, 1), jnp.int32)


def ratios(scaling, base=BASE, planes=PLANES, positions=ROW):
    """Frequencies as parts of the plain ones, and the magnitude."""
    frequencies, magnitude = scaling.frequencies(base, planes, positions)
    return np.asarray(frequencies, np.float64) / plain_frequencies(base, planes), magnitude


def heads(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 5, 2, 8))


@pytest.mark.parametrize(
    "scaling",
    [
        PositionInterpolation(1.0),
        NTK(1.0),
        DynamicNTK(1.0, 200),
        DynamicNTK(3.0, 200),
        YaRN(1.0),
        YaRN(1.0, ramp="paper"),
        Llama3(1.0),
        LongRoPE((1.0,) * 4, (2.0,) * 4, 1.0, 200),
    ],
    ids=str,
)
def test_without_a_longer_target_nothing_changes(scaling):
    """Equal up to the rounding of gamma + (1 - gamma): an angle of 100 radians is good to 2^-18."""
    where = jnp.asarray([[0, 1, 5, 100, -1]] * 2)
    ours, plain = rotate(heads(), where, Rope(scaling=scaling)), rotate(heads(), where, Rope())
    np.testing.assert_allclose(ours, plain, atol=1e-5)


@evidence("J20", oracle="plain rotation at the squeezed positions", code="llmjax.nn.rope_scaling")
def test_interpolated_scores_are_plain_scores_on_the_finer_grid(evidence):
    """a(4 m, 4 n) of the scaled model is a(m, n) of the plain one, bit for bit: 4 is a power of two."""
    where = jnp.asarray([[0, 1, 5, 100, 2047]] * 2)
    ours = rotate(heads(), 4 * where, Rope(scaling=PositionInterpolation(4.0)))
    evidence.record(jnp.abs(ours - rotate(heads(), where, Rope())).max(), 0.0)


@evidence("J20", oracle="bound of linear interpolation from the second derivative", code="llmjax.nn.rope_scaling")
@pytest.mark.parametrize("planes", [32, 64, 128])
def test_interpolated_scores_stay_near_those_of_the_whole_positions(planes, evidence):
    """|a(m + t) - linear| <= t (1 - t) / 2 sum_j |h_j| theta_j^2 <= max|h| t (1 - t) / (2 (1 - base^(-2 / planes))).

    The constant printed in the paper (d max|h| t (1 - t) / (8 ln base)) replaces a sum by a smaller integral; the
    adversarial h below exceeds it.
    """
    turning = Rope(scaling=PositionInterpolation(2.0))

    def score(h, m):
        q = np.concatenate([h.real, h.imag])[None, None, None].astype(np.float32)
        turned = np.asarray(rotate(jnp.asarray(q), jnp.asarray([[m]]), turning), np.float64)[0, 0, 0]
        return turned[:planes].sum()  # Re sum_j h_j e^(i m theta_j / 2): the key is 1 in every plane

    rng, errors = np.random.default_rng(0), []
    halfway = np.exp(-0.5j * plain_frequencies(BASE, planes))
    for h in (halfway, np.exp(1j * rng.uniform(0, 2 * math.pi, planes))):
        errors.append(abs(score(h, 1) - (score(h, 0) + score(h, 2)) / 2))
    evidence.record(max(errors), 0.125 / (1 - BASE ** (-2 / planes)))
    assert errors[0] > 2 * planes * 0.25 / (8 * math.log(BASE))


@evidence("J21", oracle="base s^(d / (d - 2)), worked by hand", code="llmjax.nn.rope_scaling")
@pytest.mark.parametrize(
    ("planes", "factor", "base"),
    [(64, 2, 20221.26), (64, 4, 40889.94), (64, 8, 82684.62), (64, 16, 167198.74), (32, 4, 41829.37)],
)
def test_ntk_is_another_base(planes, factor, base, evidence):
    """The bases are given to two decimals: 5e-3 of 20,000."""
    frequencies, _ = NTK(float(factor)).frequencies(BASE, planes, ROW)
    evidence.record(np.abs(frequencies / plain_frequencies(base, planes) - 1).max(), 5e-7)
    ends = frequencies[[0, -1]] / plain_frequencies(BASE, planes)[[0, -1]]
    np.testing.assert_allclose(ends, [1, 1 / factor], rtol=1e-12)


@evidence("J21", oracle="NTK with the s of each row's length", code="llmjax.nn.rope_scaling")
def test_dynamic_ntk_follows_the_length_of_each_row(evidence):
    """Lengths 10 and 32 for L = 16 and factor 2: s = 1 and 2 * 32 / 16 - 1 = 3; padding has position -1."""
    where = jnp.asarray([[-1, 0, 1, 5, 9], [0, 3, 20, 31, -1]])
    ours = jax.jit(lambda x: rotate(x, where, Rope(scaling=DynamicNTK(2.0, 16))))(heads())
    for row, s in enumerate([1.0, 3.0]):
        expected = rotate(heads(), where, Rope(scaling=NTK(s)))
        evidence.record(jnp.abs(ours - expected)[row].max(), 1e-5)  # angles up to 31 radians, float32


@evidence("J22", oracle="numbers worked by hand for Llama 2 (L = 4096, 64 planes)", code="llmjax.nn.rope_scaling")
def test_yarn_keeps_fast_planes_and_slows_slow_ones(evidence):
    """By turns 21 planes are unchanged, 25 on the ramp, 18 divided by s; by index the ramp goes from 20 to 46."""
    paper, _ = ratios(YaRN(8.0, ramp="paper"))
    fast, slow = np.isclose(paper, 1, atol=1e-12), np.isclose(paper, 1 / 8, atol=1e-12)
    assert (fast.sum(), slow.sum()) == (21, 18)
    assert fast[:21].all()
    assert slow[46:].all()
    assert (np.diff(paper) <= 0).all()
    code, _ = ratios(YaRN(8.0))
    gamma = np.clip((46 - np.arange(64)) / 26, 0, 1)
    evidence.record(np.abs(code - (gamma + (1 - gamma) / 8)).max(), 1e-12)


@evidence("J22", oracle="0.1 ln s + 1, worked by hand", code="llmjax.nn.rope_scaling")
@pytest.mark.parametrize(
    ("factor", "magnitude", "logits"), [(2, 1.069315, 1.143434), (8, 1.207944, 1.459129), (32, 1.346574, 1.813260)]
)
def test_yarn_sharpens_attention(factor, magnitude, logits, evidence):
    """The factors are given to six decimals. Scores grow by their square, so attention's entropy falls."""
    where = jnp.asarray([[0, 1, 2, 3, 4]] * 2)
    probabilities = []
    for given in (None, 1.0):
        config = Rope(scaling=YaRN(float(factor), magnitude=given))
        q, k = rotate(heads(), where, config), rotate(heads(1), where, config)
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k)
        probabilities.append((scores, jax.nn.softmax(scores)))
    (sharp, p), (flat, r) = probabilities
    assert -(p * jnp.log(p)).sum(-1).mean() < -(r * jnp.log(r)).sum(-1).mean()
    assert ratios(YaRN(float(factor)))[1] == pytest.approx(magnitude, abs=5e-7)
    evidence.record(jnp.abs(sharp - logits * flat).max() / jnp.abs(sharp).max(), 3e-6)


@evidence("J23", oracle="published rule by wavelength, one plane at a time", code="llmjax.nn.rope_scaling")
def test_llama3_smooths_between_two_wavelengths(evidence):
    """Wavelengths under 8192 / 4 are kept, over 8192 / 1 divided by 8, interpolated between."""
    expected = []
    for theta in plain_frequencies(500_000.0, 64):
        wavelength = 2 * math.pi / theta
        smooth = (8192 / wavelength - 1) / 3
        kept = 1.0 if wavelength < 2048 else (1 - smooth) / 8 + smooth
        expected.append(1 / 8 if wavelength > 8192 else kept)
    ours, magnitude = ratios(Llama3(), 500_000.0)
    assert magnitude == 1
    assert len(set(np.round(expected, 9))) > 3  # some planes lie between
    evidence.record(np.abs(ours - expected).max(), 1e-12)


def test_longrope_takes_its_factors_by_the_length_of_each_row():
    """sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5/12); frequencies are rounded to float32."""
    scaling = LongRoPE((1.0, 1.5), (4.0, 32.0))
    where = jnp.asarray([[4095, -1], [0, 4096]])
    found, magnitude = ratios(scaling, planes=2, positions=where)
    np.testing.assert_allclose(found, [[1, 1 / 1.5], [1 / 4, 1 / 32]], rtol=1e-7)
    assert magnitude == pytest.approx(math.sqrt(17 / 12), abs=1e-12)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_with_a_magnitude_scales_the_features_that_turn(layout):
    """Norms grow by 0.1 ln 16 + 1; features that do not turn stay. Tolerance: a few float32 roundings."""
    x, where = heads(), jnp.asarray([[0, 1, 5, 100, 7]] * 2)
    turned = rotate(x, where, Rope(layout=layout, fraction=0.5, scaling=YaRN(16.0)))
    norms = [jnp.linalg.norm(part[..., :4], axis=-1) for part in (turned, x)]
    np.testing.assert_allclose(norms[0], norms[1] * (0.1 * math.log(16) + 1), rtol=1e-6)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        (PositionInterpolation(0.25), "factor"),
        (NTK(0.25), "factor"),
        (DynamicNTK(original_length=0), "original_length"),
        (YaRN(beta_slow=32.0), "beta_slow"),
        (YaRN(factor=0.5), "factor"),
        (Llama3(low=4.0), "low"),
        (LongRoPE((), (1.0,)), "short"),
        (LongRoPE((1.0,), (0.0,)), "long"),
        (LongRoPE((1.0,), (1.0,), original_length=1), "original_length"),
    ],
)
def test_problems(scaling, field):
    with pytest.raises(ConfigError, match=rf"^{field}\b"):
        validate(scaling)
