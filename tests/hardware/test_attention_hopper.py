"""The Hopper attention kernels compiled by the real assembler for an H200 that is not there."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention
from pallas_kernels._aot import compile_for
from pallas_kernels.attention import hopper
from pallas_kernels.attention.mask import Rule, Seen
from tests.evidence import evidence

RULES = {
    "full": (Rule(0.1, False, None, None), (False, False)),
    "causal": (Rule(0.1, True, None, None), (False, False)),
    "window": (Rule(0.1, True, (1023, 0), None), (False, False)),
    "cap": (Rule(0.1, True, (1023, 0), 50.0), (False, False)),
    "packed": (Rule(0.1, True, None, None), (False, True)),
    "everything": (Rule(0.1, False, (1000, 24), 50.0), (True, True)),
}
"""rule, and whether there are positions and segments"""


def passes(head_dim, value_dim, dtype, length, masks):
    """Forward and backward pass under every one of `masks`; with "everything" come sinks too."""
    batch, heads, kv_heads = 2, 8, 2
    shapes = [(batch, length, *rest) for rest in ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))]
    shaped = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    q, d_out = (shaped(batch, length, heads, n) for n in (head_dim, value_dim))
    k, v = (shaped(batch, length, kv_heads, n) for n in (head_dim, value_dim))
    ids, rows = shaped(batch, length, dtype="int32"), shaped(batch, heads, length, dtype="float32")

    def program(q, k, v, d_out, lse, delta, ids, sinks):
        found = []
        for name in masks:
            rule, (positions, segments) = RULES[name]
            config = hopper.heuristic(*shapes, dtype, rule)
            seen = Seen((ids, ids) if positions else None, (ids, ids) if segments else None)
            found.append(hopper.forward(q, k, v, sinks if name == "everything" else None, seen, rule, config))
            found.append(hopper.backward(q, k, v, lse, delta, d_out, seen, rule, config))
        return found

    return program, (q, k, v, d_out, rows, rows, ids, shaped(heads, dtype=jnp.float32))


@evidence(
    "C18", oracle="the CUDA assembler's report: registers and spilled bytes", code="pallas_kernels.attention.hopper"
)
@pytest.mark.parametrize(
    "dims", [d if d[0] <= 128 else pytest.param(d, marks=pytest.mark.long) for d in hopper.CONFIGS], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "length"), [("bfloat16", 4096), pytest.param("float16", 1000, marks=pytest.mark.long)]
)
def test_no_register_spills_and_products_on_tensor_cores(dims, dtype, length, evidence):
    """Every shipped configuration, under every kind of mask: three kernels each, products by wgmma alone."""
    masks = list(RULES) if dtype == "bfloat16" else ["causal", "everything"]
    arguments = {"head_dim": dims[0], "value_dim": dims[1], "dtype": dtype, "length": length, "masks": masks}
    report = compile_for("h200:1x1x1", f"{__file__}:passes", arguments, report=("registers",))
    kernels = [kernel for kernel in report.kernels if kernel.name.startswith("attention_")]
    assert len(kernels) == 3 * len(masks)
    assert {kernel.registers for kernel in kernels} == {168}  # what 384 threads share; two warpgroups then take more
    evidence.record(sum(k.spill_store_bytes + k.spill_load_bytes for k in kernels), tolerance=0)
    assert report.wgmma >= len(kernels)
    assert report.mma_sync == 0


def gradient(length, packed):
    """Value and gradients of capped causal attention through the public call; `packed`: in documents."""
    arrays = [jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (4, 2, 2, 4)]
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, d_out, ids):
        options = {"is_causal": True, "logits_soft_cap": 50.0, "implementation": "hopper"}
        out = attention(q, k, v, segment_ids=ids if packed else None, **options)
        return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32))

    return jax.value_and_grad(loss, argnums=(0, 1, 2)), (*arrays, ids)


@evidence("C01", oracle="bytes of the inputs, by XLA's memory analysis", code="pallas_kernels.attention.hopper")
@pytest.mark.parametrize(("packed", "limit"), [(False, 0.02), (True, 1.1)], ids=["plain", "packed"])
def test_memory_is_linear_in_length(packed, limit, evidence):
    """Temporary memory as a part of the inputs, 4k to 64k; one head's scores alone would be 85 times them at 64k.

    Plain: two float32 numbers a row. Packed: also the inputs with absent tokens zero, and a map of 4 bytes for a block
    of scores, 3 % of the inputs at 64k.
    """
    for length in (4096, 16384, 65536):
        report = compile_for("h200:1x1x1", f"{__file__}:gradient", {"length": length, "packed": packed})
        evidence.record(report.temporary_bytes / (2 * (4 + 2 + 2 + 4) * 128 * length), limit)
