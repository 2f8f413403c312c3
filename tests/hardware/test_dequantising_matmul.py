"""The dequantising product compiled by the real compilers for chips that are not there."""

import jax
import jax.numpy as jnp
import pytest

from llmjax.quant.nf4 import LEVELS
from pallas_kernels._aot import compile_for
from pallas_kernels.dequantising_matmul import dequantising_matmul

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
KINDS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4, "block": 64},
    "int4_zeros": {"bits": 4, "block": 128, "zeros": True},
    "nf4": {"bits": 4, "block": 64, "codebook": LEVELS},
}


def build(name, kind="nf4", rows=16, inputs=4096, outputs=14336, transpose=False, dtype="bfloat16"):
    """The product with a matrix of that kind, and its arguments; kind "dense" is the product with a bfloat16 matrix."""
    x = jax.ShapeDtypeStruct((rows, outputs if transpose else inputs), jnp.dtype(dtype))
    if kind == "dense":
        return jnp.matmul, (x, jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16))
    options = dict(KINDS[kind])
    block, zeros = options.pop("block", inputs), options.pop("zeros", False)
    codes = jax.ShapeDtypeStruct((outputs, inputs * options["bits"] // 8), jnp.uint8)
    scales = jax.ShapeDtypeStruct((outputs, inputs // block), jnp.float32)

    def run(x, *weights):
        return dequantising_matmul(x, *weights, transpose=transpose, implementation=name, **options)

    return run, (x, codes, scales, *[scales] * zeros)


def compiled(target, report=(), **arguments):
    return compile_for(target, f"{__file__}:build", arguments, report=report)


SHAPES = {
    "int8": {"kind": "int8"},
    "int4_zeros_many_rows": {"kind": "int4_zeros", "rows": 1000, "inputs": 5120, "outputs": 11392},
    "nf4_transposed": {"kind": "nf4", "rows": 300, "transpose": True},
    "nf4_float32_many_blocks": {"kind": "nf4", "inputs": 14336, "outputs": 512, "dtype": "float32"},
}


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tpu_kernel_compiles_and_no_dense_matrix_is_made(target, shape):
    """Temporary memory: x and the result by halves, padded scales; far less than the matrix in the dtype of x."""
    report = compiled(target, name="tpu", **SHAPES[shape])
    assert [call for calls in report.order.values() for call in calls if "dequantising_matmul" in call]
    x, codes = build("tpu", **SHAPES[shape])[1][:2]
    dense = codes.size * (1 if shape == "int8" else 2) * x.dtype.itemsize
    assert report.temporary_bytes < dense / 3


def test_many_rows_fit_the_memory_of_a_core():
    compiled("v5p:2x2x1", name="tpu", rows=2048)


CYCLES = {("int8", 16): 50_524, ("int4", 16): 94_153, ("nf4", 16): 192_573}
"""The compiler's estimates on v5p, W 4096 x 14336; it has none for the deep loops of many rows and 4 bits."""


@pytest.mark.parametrize(("kind", "rows"), CYCLES)
def test_estimated_cycles(kind, rows):
    assert (
        compiled("v5p:2x2x1", ("cycles",), name="tpu", kind=kind, rows=rows).total_cycles <= 1.05 * CYCLES[kind, rows]
    )
