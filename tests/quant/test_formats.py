"""Number formats: their grids, tables and errors, beside numpy, scipy, ml_dtypes and published figures."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from llmjax.config import validate
from llmjax.fields import ConfigError
from llmjax.quant.af4 import AF4
from llmjax.quant.float8 import Float8
from llmjax.quant.formats import into_blocks, out_of_blocks, rounded
from llmjax.quant.fp4 import E2M1, FP4
from llmjax.quant.integers import Integer
from llmjax.quant.lloyd_max import LloydMax, normal_optimum, sample_optimum
from llmjax.quant.nf4 import NF4
from llmjax.quant.noise import expected_output_error, output_error, sqnr_db, uniform_sqnr_db
from llmjax.quant.packing import pack, packed_size, unpack
from tests.evidence import evidence

ULP = 2e-7
"""One rounding of float32, relative."""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def blocks_of_64(w):
    return into_blocks(w, 64)


# ---- integers --------------------------------------------------------------------------------------------------------


def uniform(w, bits, zero_point):
    """The definition in float64, block by block: the grid of one block and its nearest points."""
    found = np.empty(w.shape)
    for index in np.ndindex(w.shape[:-1]):
        block = w[index].astype(np.float64)
        if zero_point == "none":
            top = 2 ** (bits - 1) - 1
            grid = np.arange(-top, top + 1) * np.abs(block).max() / top
        else:
            low, high = block.min(), block.max()
            if zero_point == "integer":
                low, high = min(low, 0), max(high, 0)
            step = (high - low) / (2**bits - 1)
            start = round(low / step) * step if zero_point == "integer" else low
            grid = start + step * np.arange(2**bits)
        found[index] = grid[np.abs(block[:, None] - grid).argmin(1)]
    return found


@evidence("H01", oracle="nearest point of the grid in float64", code="llmjax.quant.integers")
@pytest.mark.parametrize(("bits", "zero_point"), [(4, "none"), (3, "integer"), (8, "integer"), (5, "real")])
@pytest.mark.parametrize("block", [16, "channel", "tensor"])
def test_integers_are_the_nearest_grid_points(evidence, bits, zero_point, block):
    """Numbers in float32 that lie half-way between points within rounding may go either way: none here does."""
    w = normal(6, 32, seed=bits) + 0.2
    form = Integer(bits=bits, zero_point=zero_point, block=block)
    shape = {16: (6, 2, 16), "channel": (6, 1, 32), "tensor": (1, 1, 192)}[block]
    want = uniform(w.reshape(shape), bits, zero_point).reshape(6, 32)
    got = np.asarray(jax.jit(rounded, static_argnums=1)(w, form))
    evidence.record(np.abs(got - want).max() / np.abs(w).max(), 4 * ULP)
    assert len(np.unique(got.reshape(shape)[0, 0])) <= 2**bits


@evidence(
    "H01", oracle="law: no weight is off by more than half a step; the ends are exact", code="llmjax.quant.integers"
)
@pytest.mark.parametrize("zero_point", ["none", "integer", "real"])
def test_half_a_step(evidence, zero_point):
    w = normal(64, 64) + 0.3
    form = Integer(bits=4, zero_point=zero_point)
    steps, _ = jax.jit(form.fit)(w)
    got = np.asarray(jax.jit(rounded, static_argnums=1)(w, form))
    evidence.record((np.abs(got - w) / np.asarray(steps)[:, None]).max(), 0.5 + 1e-5)
    if zero_point == "real":
        np.testing.assert_allclose(got.min(1), w.min(1), rtol=4 * ULP)
        np.testing.assert_allclose(got.max(1), w.max(1), rtol=4 * ULP)


def test_a_constant_block_is_exact():
    """A range of nothing leaves no step: such blocks come back whole, zeros as zeros."""
    w = jnp.stack([jnp.full(64, -0.37), jnp.zeros(64), jnp.full(64, 1e-3)])
    for form in (Integer(zero_point="real"), NF4(), Integer(), Float8(), FP4(), Integer(zero_point="integer")):
        np.testing.assert_allclose(jax.jit(rounded, static_argnums=1)(w, form), w, rtol=4 * ULP)


# ---- packing and blocks ----------------------------------------------------------------------------------------------


@evidence("H02", oracle="the bits of each code in turn, one by one", code="llmjax.quant.packing")
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_packing(evidence, bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 13), dtype=np.uint8)
    text = ["".join(f"{code:0{bits}b}" for code in row).ljust(8 * packed_size(13, bits), "0") for row in codes]
    want = [[int(row[i : i + 8], 2) for i in range(0, len(row), 8)] for row in text]
    packed = jax.jit(pack, static_argnums=1)(codes, bits)
    assert packed.shape == (3, -(-13 * bits // 8))
    evidence.record(np.abs(np.asarray(packed, int) - want).max(), 0)
    np.testing.assert_array_equal(jax.jit(unpack, static_argnums=(1, 2))(packed, bits, 13), codes)


@evidence(
    "H03",
    oracle="laws: Q(cW) = cQ(W), zeros stay zero, the largest is exact, a short last block is as good as alone",
    code="llmjax.quant.formats",
)
@pytest.mark.parametrize("form", [NF4(block=8), Integer(block=8), Float8(block=8), E2M1(block=8)], ids=str)
def test_blocks(evidence, form):
    """A factor that is no power of two rounds once more."""
    w = normal(3, 7)
    w[1] = 0
    quantise = jax.jit(rounded, static_argnums=1)
    got = quantise(w, form)
    evidence.record(np.abs(quantise(3 * w, form) - 3 * got).max(), 10 * ULP)
    np.testing.assert_array_equal(quantise(4 * w, form), 4 * got)
    assert not np.any(got[1])
    largest = np.abs(np.stack([into_blocks(array, 8) for array in (w, got)])).max(-1)
    np.testing.assert_allclose(largest[1], largest[0], rtol=4 * ULP)
    last = w.reshape(-1)[16:]
    np.testing.assert_allclose(got.reshape(-1)[16:], quantise(last[None], form)[0], rtol=4 * ULP)
    np.testing.assert_array_equal(out_of_blocks(into_blocks(w, 8), 7, 3), w)


# ---- codebooks -------------------------------------------------------------------------------------------------------


@evidence("H04", oracle="normal quantiles by scipy, delta = 0.9677083", code="llmjax.quant.nf4")
def test_nf4_table(evidence):
    positive, negative = (stats.norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
    want = np.sort([*positive, 0, *-negative]) / positive.max()
    evidence.record(np.abs(np.asarray(NF4().levels) - want).max(), ULP)
    assert NF4().levels[7] == 0


@evidence("H05", oracle="ml_dtypes float4_e2m1fn", code="llmjax.quant.fp4")
def test_e2m1_is_the_bit_pattern(evidence):
    x = normal(4096)
    want = (x / np.abs(x).max() * 6).astype(ml_dtypes.float4_e2m1fn)
    form = E2M1(block=4096)
    codes = jax.jit(lambda x: form.round(x, *form.fit(x)))(x)
    values = np.asarray(form.decode(codes, jnp.asarray(6.0), None))
    evidence.record(np.abs(values - want.astype(np.float32)).max(), 0)
    patterns, some = want.view(np.uint8), values != 0
    np.testing.assert_array_equal(np.asarray(codes)[some], patterns[some])


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)])
def test_float8_is_the_cast_of_ml_dtypes(kind, dtype):
    x = normal(1 << 14)
    scale = np.abs(x).max() * np.float32(1 / float(ml_dtypes.finfo(dtype).max))
    want = (x * (1 / scale)).astype(dtype).view(np.uint8)
    form = Float8(kind=kind)
    got = np.asarray(jax.jit(lambda x: form.round(x, jnp.asarray(scale), None))(x))
    np.testing.assert_array_equal(got, want)


@evidence("H05", oracle="law: each inner level is a median of what it stands for (sampled)", code="llmjax.quant.af4")
def test_af4_levels_are_medians(evidence):
    """Of w / max|w| in blocks of 64, the cells next to 0 reaching to 0; sampling leaves about 1e-3."""
    w = np.random.default_rng(0).normal(size=(40_000, 64))
    x = (w / np.abs(w).max(1, keepdims=True)).reshape(-1)
    levels = np.asarray(AF4().levels)
    edges = (levels[1:] + levels[:-1]) / 2
    edges[6:8] = 0
    cell = np.searchsorted(edges, x)
    apart = [abs(np.median(x[cell == i]) - levels[i]) for i in range(1, 15) if i != 7]
    evidence.record(max(apart), 3e-3)


@evidence(
    "H06", oracle="published table: Max 1960, and its mean squared error by quadrature", code="llmjax.quant.lloyd_max"
)
def test_lloyd_max_of_a_normal(evidence):
    levels = np.asarray(normal_optimum(16))
    evidence.record(np.abs(levels[8:] - [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326]).max(), 1e-4)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    cells = zip(levels, edges[:-1], edges[1:], strict=True)
    mse = sum(stats.norm.expect(lambda x, c=c: (x - c) ** 2, lb=low, ub=high) for c, low, high in cells)
    assert mse == pytest.approx(0.009497, abs=1e-5)
    w = normal(512, 64)
    spread = np.sqrt((w**2).mean(1, keepdims=True))
    want = spread * levels[np.abs(w[..., None] / spread[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(jax.jit(rounded, static_argnums=1)(w, LloydMax()), want, rtol=1e-5)


@evidence("H06", oracle="the normal distribution's own optimum, from its samples", code="llmjax.quant.lloyd_max")
def test_lloyd_max_of_samples(evidence):
    """200,000 samples leave about 1 percent of a spread to the outermost levels."""
    found = sample_optimum(np.random.default_rng(0).normal(size=200_000), 8)
    evidence.record(np.abs(found - normal_optimum(8)).max(), 0.02)
    np.testing.assert_array_equal(sample_optimum(np.asarray([1.0, 2.0, 2.0, 9.0]), 8), [1, 2, 9])


# ---- errors ----------------------------------------------------------------------------------------------------------

TABLE = [
    (Integer(), 0.011595),
    (Integer(zero_point="real"), 0.008039),
    (E2M1(), 0.011169),
    (FP4(), 0.01486),
    (NF4(), 0.008455),
    (Integer(bits=8), 0.000035),
    (Integer(block=256), 0.015965),
    (NF4(block=256), 0.009735),
    (Integer(block=4096), 0.024712),
    (NF4(block=4096), 0.012063),
]
"""Mean squared errors on N(0, 1), 4 million samples, made with numpy and bitsandbytes."""


@evidence(
    "H10",
    oracle="table of mean squared errors on N(0, 1), made with bitsandbytes and numpy",
    code="llmjax.quant.formats",
)
@pytest.mark.parametrize(("form", "want"), TABLE, ids=str)
def test_error_on_normal_weights(evidence, form, want):
    """Half a million samples in blocks of up to 4,096; the smallest figure is given to two digits only."""
    w = normal(128, 4096)
    mse = float(jnp.mean(jnp.square(jax.jit(rounded, static_argnums=1)(w, form) - w)))
    evidence.record(abs(mse / want - 1), 0.02)


@evidence(
    "H08",
    oracle="closed forms: 24.08 dB for a uniform signal, 1.76 more for a sine, step^2 / 12",
    code="llmjax.quant.noise",
)
def test_sqnr(evidence):
    """A mid-rise grid of 16 levels; a sine's error is not quite uniform, as the notes measured (25.31 dB)."""
    x = np.random.default_rng(0).uniform(-1, 1, 1 << 20).astype(np.float32)
    sine = np.sin(2 * np.pi * np.arange(1 << 20) * 0.1234567).astype(np.float32)

    def grid(x):
        return np.clip((np.floor(x * 8) + 0.5) / 8, -15 / 16, 15 / 16)

    evidence.record(abs(float(sqnr_db(x, grid(x))) - 20 * np.log10(16)), 0.05)
    evidence.record(abs(uniform_sqnr_db(4) - 20 * np.log10(16)), 0.01)
    assert float(sqnr_db(sine, grid(sine))) == pytest.approx(uniform_sqnr_db(4, power=0.5), abs=0.6)
    assert uniform_sqnr_db(4, power=0.5) - uniform_sqnr_db(4) == pytest.approx(1.76, abs=0.01)


@evidence("H09", oracle="law: E|xE|^2 = outputs step^2 / 12 |x|^2 for independent errors", code="llmjax.quant.noise")
def test_output_error(evidence):
    """The mean of 64 rows of 256 outputs spreads by about 1 percent, the bound holds for every row."""
    w, x = normal(256, 256), normal(64, 256, seed=1)
    form = Integer(bits=6, block="tensor")
    step = float(np.abs(w).max() / form.top)
    error, bound = jax.jit(output_error)(x, w, rounded(w, form))
    evidence.record(abs(float(jnp.mean(error / expected_output_error(x, step, 256))) - 1), 0.1)
    assert np.all(error <= bound)


@evidence(
    "H11", oracle="table of relative errors on N(0, 1), 2048 x 2048, made with numpy", code="llmjax.quant.formats"
)
@pytest.mark.parametrize(
    ("block", "eight", "four"), [("tensor", 0.0117, 0.199), ("channel", 0.0078, 0.133), (128, 0.0059, 0.0998)]
)
def test_relative_error(evidence, block, eight, four):
    """The matrix of the table itself, its columns being outputs; figures are given to two or three digits."""
    w = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32).T
    for bits, want in ((8, eight), (4, four)):
        got = jax.jit(rounded, static_argnums=1)(w, Integer(bits=bits, block=block, zero_point="real"))
        evidence.record(abs(float(np.linalg.norm(got - w) / np.linalg.norm(w)) / want - 1), 0.01)


@pytest.mark.parametrize(
    ("form", "field"),
    [(Integer(bits=9), "bits"), (Integer(block=0), "block"), (AF4(block=32), "block"), (LloydMax(bits=0), "bits")],
)
def test_bad_formats(form, field):
    with pytest.raises(ConfigError, match=field):
        validate(form)
