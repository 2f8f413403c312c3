"""The Hopper kernels of the selective scan compiled by the real assembler for an H200 that is not there."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan.hopper_blocks import BLOCK
from tests.evidence import evidence

CASES = {
    "mamba": {},
    "bare": {"given": (), "dt_softplus": False},
    "packed": {"packed": True, "length": 1000, "reverse": True},
    "state_32": {"state": 32, "packed": True, "groups": 4, "dtype": "float32"},
    "odd": {"state": 5, "width": 1000, "groups": 2, "dtype": "float16"},
}


def gradient(
    batch=1,
    length=2048,
    width=4096,
    groups=1,
    state=16,
    dtype="bfloat16",
    packed=False,
    given=("D", "z", "dt_bias", "initial_state"),
    **options,
):
    """Value and gradients of a scan through the public call."""
    shaped = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    tokens, per_state = shaped(batch, length, width), shaped(batch, length, groups, state)
    arrays = {"x": tokens, "dt": tokens, "A": shaped(width, state, dtype="float32"), "B": per_state, "C": per_state}
    per_channel = shaped(width, dtype="float32")
    more = {"D": per_channel, "z": tokens, "dt_bias": per_channel}
    more["initial_state"] = shaped(batch, width, state, dtype="float32")
    arrays |= {name: more[name] for name in given}
    options = {"dt_softplus": True, **options}

    def loss(arrays, d_y, ids):
        y, final = selective_scan(**arrays, segment_ids=ids if packed else None, implementation="hopper", **options)
        return jnp.vdot(y, d_y, preferred_element_type=jnp.float32) + jnp.sum(final)

    return jax.value_and_grad(loss), (arrays, tokens, shaped(batch, length, dtype="int32"))


def compiled(**arguments):
    return compile_for("h200:1x1x1", f"{__file__}:gradient", arguments, report=("registers",))


@evidence("C18", oracle="the CUDA assembler's report: spilled bytes", code="pallas_kernels.selective_scan.hopper")
@pytest.mark.parametrize("case", CASES)
def test_no_register_spills(case, evidence):
    """One forward and one backward kernel, with all that the public call takes."""
    kernels = [kernel for kernel in compiled(**CASES[case]).kernels if kernel.name.startswith("selective_scan_")]
    assert len(kernels) == 2
    evidence.record(sum(k.spill_store_bytes + k.spill_load_bytes for k in kernels), tolerance=0)


@evidence("C09", oracle="bytes of the inputs, by XLA's memory analysis", code="pallas_kernels.selective_scan.hopper")
def test_memory_is_that_of_the_inputs_and_few_states(evidence):
    """Temporary memory beside the states before every block, as a part of the inputs; batch 8, no gate."""
    report = compiled(batch=8, given=("D", "dt_bias"))
    states = 8 * (2048 // BLOCK) * 4096 * 16 * 4
    inputs = 2 * 2 * 8 * 2048 * 4096
    evidence.record((report.temporary_bytes - states) / inputs, tolerance=1.1)
