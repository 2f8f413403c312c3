"""The dequantising product against the dense matrix, made code by code in float64 by numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequantising_matmul import dequantising_matmul
from tests.evidence import evidence

PLAIN = ("reference", "xla")
TOLERANCE = 1e-6
"""Float32 sums over at most 512 products, in another order, over the largest result."""
BOOK = tuple(np.sin(np.arange(16)).tolist())
"""No order, no symmetry: every code counts."""
CASES = {
    "int8_channel": {"bits": 8},
    "int8_groups_zeros": {"bits": 8, "blocks": 4, "zeros": True},
    "int4_groups": {"bits": 4, "blocks": 8},
    "int4_channel_zeros": {"bits": 4, "zeros": True},
    "codebook": {"bits": 4, "blocks": 8, "codebook": BOOK},
}


def drawn(bits, blocks=1, zeros=False, codebook=None, outputs=24, inputs=32, dtype=np.float32):
    """(codes, scales, zeros or None), the options, and W [inputs, outputs] in float64, a code at a time."""
    rng = np.random.default_rng(outputs + inputs)
    codes = rng.integers(0, 256, (outputs, inputs * bits // 8), dtype=np.uint8)
    scales = rng.uniform(0.5, 1, (outputs, blocks)).astype(np.float32)
    points = rng.uniform(0, 2**bits, (outputs, blocks)).astype(np.float32) if zeros else None
    dense = np.empty((inputs, outputs))
    for o, i in np.ndindex(outputs, inputs):
        byte, block = int(codes[o, i * bits // 8]), i // (inputs // blocks)
        code = byte if bits == 8 else (byte % 16 if i % 2 else byte // 16)
        middle = 2 ** (bits - 1) if points is None else float(points[o, block])
        dense[i, o] = scales[o, block] * (code - middle if codebook is None else codebook[code])
    return (codes, scales, points), {"bits": bits, "codebook": codebook}, dense


def against_numpy(case, implementation, rows=7, dtype=np.float32):
    """The worst error of y and dx, with W and with its transpose, over the largest; also that scales get none."""
    weights, options, dense = drawn(**case)
    worst = 0.0
    for transpose, matrix in ((False, dense), (True, dense.T)):
        rng = np.random.default_rng(1)
        x = rng.standard_normal((rows, matrix.shape[0])).astype(np.float32)
        dy = rng.standard_normal((rows, matrix.shape[1])).astype(np.float32)
        f = functools.partial(dequantising_matmul, **options, transpose=transpose, implementation=implementation)

        @jax.jit
        def both(x, scales, dy, f=f):
            y, pull = jax.vjp(lambda x, scales: f(x, weights[0], scales, weights[2]), x, scales)
            return y, *pull(dy)

        y, dx, nothing = both(x.astype(dtype), weights[1], dy.astype(dtype))
        assert y.dtype == dx.dtype == dtype
        assert not nothing.any()
        for got, want in ((y, x @ matrix), (dx, dy @ matrix.T)):
            worst = max(worst, float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()))
    return worst


@evidence("C14", oracle="numpy float64, W made code by code, y and dx", code="pallas_kernels.dequantising_matmul")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", PLAIN)
def test_agrees_with_the_dense_matrix(implementation, case, evidence):
    evidence.record(against_numpy(CASES[case], implementation), TOLERANCE)


def test_axes_in_front_and_no_rows():
    (codes, scales, _), options, dense = drawn(4, 2)
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    y = dequantising_matmul(x, codes, scales, **options)
    np.testing.assert_allclose(y, x @ dense, atol=TOLERANCE * np.abs(x @ dense).max())
    assert dequantising_matmul(x[:0], codes, scales, **options).shape == (0, 3, 24)


SHAPES = {"x": (5, 32), "codes": (24, 16), "scales": (24, 4)}


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({}, {"bits": 3}, "bits=3"),
        ({"codes": (24,)}, {}, r"codes are uint8 of shape \(24,\)"),
        ({"x": (5, 16)}, {}, r"x is float32 of shape \(5, 16\), codes have \(24, 16\): expected \[..., 32\]"),
        ({}, {"transpose": True}, r"x is float32 of shape \(5, 32\), .* \[..., 24\]"),
        ({"scales": (24, 5)}, {}, r"scales has shape \(24, 5\), codes \(24, 16\)"),
        ({"scales": (4, 24)}, {}, r"scales has shape \(4, 24\), codes \(24, 16\)"),
        ({}, {"zeros": jnp.zeros((24, 1))}, r"zeros has shape \(24, 1\), scales \(24, 4\)"),
        ({}, {"codebook": (0.0, 1.0)}, "codebook of 2 levels for codes of 4 bits: it needs 16"),
        ({}, {"codebook": BOOK, "zeros": jnp.zeros((24, 4))}, "no zeros"),
        ({}, {"implementation": "fast"}, "'fast' is unknown: use one of reference, tpu, xla"),
    ],
)
def test_bad_input_is_named(shapes, options, message):
    arrays = {
        name: jnp.zeros(shape, jnp.uint8 if name == "codes" else jnp.float32)
        for name, shape in (SHAPES | shapes).items()
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: dequantising_matmul(**(arrays | {"bits": 4} | options)))
