"""The dequantising product's TPU kernel, simulated on the CPU with its memories and copies; a race fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequantising_matmul import dequantising_matmul, registry, tpu
from tests.evidence import evidence
from tests.kernels.simulated import simulated_tpu
from tests.kernels.test_dequantising_matmul import BOOK, TOLERANCE, against_numpy, drawn

pytestmark = pytest.mark.adapters

CASES = {
    # Two blocks of rows, of outputs and of bytes, the last of bytes and of rows half empty.
    "int8_channel": {"bits": 8, "inputs": 384},
    "int8_groups_zeros": {"bits": 8, "inputs": 384, "blocks": 6, "zeros": True},
    "int4_many_groups": {"bits": 4, "inputs": 2048 + 512, "blocks": 160},
    "int4_channel_zeros": {"bits": 4, "inputs": 768, "zeros": True},
    "codebook": {"bits": 4, "inputs": 768, "blocks": 3, "codebook": BOOK},
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "ROWS", 8)
    monkeypatch.setattr(tpu, "COLUMNS", 128)
    monkeypatch.setattr(tpu, "DEPTH", 512)


@evidence("C14", oracle="numpy float64, W made code by code, y and dx", code="pallas_kernels.dequantising_matmul.tpu")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_dense_matrix_and_has_no_race(case, small_blocks, evidence):
    with simulated_tpu():
        error = against_numpy({"outputs": 256} | CASES[case], "tpu", rows=12)
    evidence.record(error, TOLERANCE)


@evidence(
    "C14", oracle="law: bfloat16 is at most 1.3 times as far off as XLA", code="pallas_kernels.dequantising_matmul.tpu"
)
@pytest.mark.parametrize("blocks", [1, 4])
def test_bfloat16_is_as_exact_as_xla(blocks, evidence):
    """RMS errors against float64, of the same rounded x."""
    (codes, scales, _), options, dense = drawn(4, blocks, outputs=128, inputs=256)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((16, 256)), jnp.bfloat16)
    want = np.asarray(x, np.float64) @ dense
    with simulated_tpu():
        ours = dequantising_matmul(x, codes, scales, **options, implementation="tpu")
    theirs = dequantising_matmul(x, codes, scales, **options, implementation="xla")
    rms = [np.sqrt(np.mean((np.asarray(y, np.float64) - want) ** 2)) for y in (ours, theirs)]
    evidence.record(rms[0], 1.3 * rms[1])


def refused(message, dtype=jnp.bfloat16, rows=8, codes=(256, 128), blocks=4, **options):
    arrays = [
        jax.ShapeDtypeStruct((rows, codes[1] * 8 // options.setdefault("bits", 4)), dtype),
        jax.ShapeDtypeStruct(codes, jnp.uint8),
        jax.ShapeDtypeStruct((codes[0], blocks), jnp.float32),
    ]
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda *a: dequantising_matmul(*a, implementation="tpu", **options), *arrays)


def test_refusals_say_why():
    refused('"tpu" does not run on cpu')
    with simulated_tpu():
        refused("takes bfloat16 and float32, not float16", jnp.float16)
        refused("takes one row at least", rows=0)
        refused("multiples of 128, not 200 and 128", codes=(200, 128))
        refused("multiples of 128, not 256 and 64", codes=(256, 64))
        refused("codebooks of 4 bits, not of 8", bits=8, codebook=tuple(range(256)))
        refused("that divide 256 or are multiples of it, not of 96", codes=(256, 384), blocks=8)


def test_platform_chooses_the_implementation():
    def chosen(outputs):
        weights, options, _ = drawn(4, outputs=outputs, inputs=256)
        form = registry.Form(256, options["bits"], None)
        return registry.choose(None, jnp.zeros((2, 256)), registry.Weights(*weights), form)

    assert chosen(128) == "xla"
    with simulated_tpu():
        assert [chosen(128), chosen(24)] == ["tpu", "xla"]
