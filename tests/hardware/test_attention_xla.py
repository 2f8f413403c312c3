"""Attention in plain XLA, forward and backward, compiled for chips that are not there; memory linear in length."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention
from pallas_kernels._aot import compile_for
from tests.evidence import evidence

TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h200:1x1x1")


def program(length, implementation="xla"):
    """Output, log-sum-exp and gradients of packed, windowed, capped attention with sinks."""
    arrays = [jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16) for heads in (2, 1, 1)]
    sinks, ids = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, sinks, ids):
        options = {"is_causal": True, "local_window_size": (length // 2, 0), "logits_soft_cap": 30.0}
        options |= {"segment_ids": ids, "sinks": sinks, "return_residual": True, "implementation": implementation}
        return sum(jnp.sum(x.astype(jnp.float32)) for x in attention(q, k, v, **options))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), (*arrays, sinks, ids)


def compiled(target, **arguments):
    return compile_for(target, f"{__file__}:program", arguments)


@pytest.mark.parametrize("target", TARGETS)
def test_short_and_long_forms_compile_for(target):
    assert compiled(target, length=512).output_bytes > 0
    assert compiled(target, length=4096).output_bytes > 0


@evidence("C02", oracle="memory analysis of the compilers", code="pallas_kernels.attention.tiled")
@pytest.mark.parametrize("target", ["v5p:2x2x1", "h200:1x1x1"])
def test_memory_is_linear_in_length(target, evidence):
    """16 times the length, from 4k to 64k, takes at most 16 times the temporary memory."""
    short, long = (compiled(target, length=length).temporary_bytes for length in (4096, 65536))
    evidence.record(long / short, 16.0)
