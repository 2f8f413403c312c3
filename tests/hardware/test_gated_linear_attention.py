"""The TPU kernels of gated linear attention and SSD, compiled by libtpu for chips that are not there.

Estimates count cycles of the whole chip; on v5p that is two cores, which two blocks of heads keep busy.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for
from pallas_kernels.gated_linear_attention import gated_linear_attention, ssd
from tests.evidence import evidence

TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
MAMBA2 = {"length": 1024, "heads": 32, "groups": 2, "head_dim": 64, "d_state": 128}


def gradient(function, arrays):
    """Results and gradients of every array, for cotangents that are the results."""

    def both(*arrays):
        results, pull = jax.vjp(function, *arrays)
        return results, pull(results)

    return both, arrays


def duality(length, heads, groups, head_dim, d_state, backward=True):
    """`ssd` as Mamba-2 calls it: heads side by side, as its projections give them."""
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    shared = shape(1, length, groups * d_state)
    weights = [shape(heads, dtype=jnp.float32)] * 2
    arrays = (shape(1, length, heads * head_dim), shape(1, length, heads), weights[0], shared, shared, weights[1])

    def run(x, dt, A, B, C, bias):
        x, B, C = x.reshape(1, length, heads, -1), B.reshape(1, length, groups, -1), C.reshape(1, length, groups, -1)
        y, last = ssd(x, dt, -jnp.exp(A), B, C, dt_bias=bias, dt_softplus=True, implementation="tpu")
        return y.reshape(1, length, -1), last

    return gradient(run, arrays) if backward else (run, arrays)


def attention(length, heads, groups, dims, dtype="bfloat16", bonus=False, packed=False, vector=False, backward=True):
    """Linear attention with everything it has; `dims`: of a key and of a value."""
    shape = lambda *s, dtype=jnp.dtype(dtype): jax.ShapeDtypeStruct((2, length, *s), dtype)
    decays = (heads, dims[0]) if vector else (heads,)
    arrays = (shape(groups, dims[0]), shape(groups, dims[0]), shape(heads, dims[1]), shape(*decays, dtype=jnp.float32))

    def run(query, key, value, decay):
        extra = {"bonus": jnp.ones((heads, dims[0]))} if bonus else {}
        ids = jnp.repeat(jnp.arange(2), length // 2)[None].repeat(2, 0) if packed else None
        return gated_linear_attention(query, key, value, decay, segment_ids=ids, implementation="tpu", **extra)

    return gradient(run, arrays) if backward else (run, arrays)


def compiled(target, builder, arguments, report=()):
    return compile_for(target, f"{__file__}:{builder}", arguments, report=report)


GATES = {"length": 512, "heads": 4, "groups": 4, "dims": [128, 128], "vector": True}
CASES = {
    "mamba2_groups": ("duality", {"length": 300, "heads": 16, "groups": 8, "head_dim": 64, "d_state": 128}),
    "retention_float32": (
        "attention",
        {"length": 256, "heads": 2, "groups": 2, "dims": [128, 256], "dtype": "float32"},
    ),
    "gla": ("attention", {"length": 512, "heads": 4, "groups": 4, "dims": [128, 256], "vector": True}),
    "rwkv6": (
        "attention",
        {"length": 300, "heads": 4, "groups": 4, "dims": [64, 64], "bonus": True, "packed": True, "vector": True},
    ),
    "odd_bonus_packed": (
        "attention",
        {"length": 200, "heads": 3, "groups": 3, "dims": [40, 72], "bonus": True, "packed": True},
    ),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_for(target, name):
    order = compiled(target, *CASES[name]).order
    calls = [call for found in order.values() for call in found if call.startswith("tpu_custom_call")]
    assert sum("gated_linear_attention_forward" in call for call in calls) == 1
    assert sum("gated_linear_attention_backward" in call for call in calls) == 1


@evidence(
    "C10",
    oracle="the cycles that were recorded, by libtpu's estimate",
    code="pallas_kernels.gated_linear_attention.tpu",
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(
    ("builder", "arguments", "recorded"),
    [("duality", MAMBA2, (17_352, 71_011)), ("attention", GATES, (25_649, 75_884))],
    ids=["Mamba-2", "GLA"],
)
def test_cycles(builder, arguments, backward, recorded, evidence):
    """32 of Mamba-2's heads, 64 x 128, 1024 tokens; 4 of GLA's, 128 x 128, 512 tokens: within 5 % of the recorded."""
    cycles = compiled("v5p:2x2x1", builder, arguments | {"backward": backward}, ("cycles",)).cycles
    evidence.record(sum(n for name, n in cycles.items() if "gated_linear_attention" in name), 1.05 * recorded[backward])


@evidence(
    "C10",
    oracle="bytes of inputs and states, by libtpu's memory analysis",
    code="pallas_kernels.gated_linear_attention.tpu",
)
def test_memory_is_inputs_and_a_state_a_chunk(evidence):
    """Temporary memory of forward and backward."""
    length, heads, head_dim, d_state = 4096, 32, 64, 128
    arguments = MAMBA2 | {"length": length}
    report = compiled("v5p:2x2x1", "duality", arguments)
    states = 2 * length // 128 * heads * head_dim * d_state
    evidence.record(report.temporary_bytes, 1.1 * report.argument_bytes + states)
