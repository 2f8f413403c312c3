"""Ring attention compiled for chips that are not there: what is sent travels while its forerunner is worked on."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import _aot
from pallas_kernels.ring_attention import sharded_ring_attention
from tests.evidence import evidence

START, WORK, DONE = "collective-permute-start", "conditional", "collective-permute-done"
OPCODES = "|".join((START, WORK, DONE, "collective-permute", "custom-call"))


def program(devices, local=2048, dims=(128, 128), backward=False, packed=False):
    """Causal grouped attention, bfloat16, of `local` tokens a device in zigzag; or its gradient."""
    mesh = Mesh(np.array(devices), ("context",), axis_types=(AxisType.Auto,))
    spec = P(None, "context")
    length, heads = local * len(devices), ((8, dims[0]), (2, dims[0]), (2, dims[1]))
    shapes = [((1, length, *shape), jnp.bfloat16) for shape in heads] + [((1, length), jnp.int32)] * packed
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec)) for shape in shapes]

    def run(q, k, v, ids=None):
        return sharded_ring_attention(q, k, v, spec=spec, mesh=mesh, is_causal=True, segment_ids=ids)

    loss = lambda *arrays: jnp.sum(jnp.square(run(*arrays).astype(jnp.float32)))
    return jax.grad(loss, argnums=(0, 1, 2)) if backward else run, tuple(arrays)


def schedule(text):
    """Permutes, conditionals and kernels of every computation in schedule order; a loop's body is a computation."""
    found, computation = {}, ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        computation = head[1] if head else computation
        call = re.match(
            rf"\s+(?:ROOT )?%?([\w-]+)[\w.]* = .*?\s(custom-call|{START}|{DONE}|collective-permute|{WORK})\(", line
        )
        if call and (call[2] != "custom-call" or "attention" in call[1]):
            found.setdefault(computation, []).append(call[1] if call[2] == "custom-call" else call[2])
    return found


def compiled(target, monkeypatch, **arguments):
    monkeypatch.setattr(_aot, "hlo_order", schedule)
    return _aot.compile_for(target, f"{__file__}:program", arguments)


@evidence("C04", oracle="the schedules of libtpu and XLA:GPU", code="pallas_kernels.ring_attention.ring")
@pytest.mark.parametrize(("backward", "packed"), [(False, False), (True, True)])
@pytest.mark.parametrize("target", ["v5p:2x2x1", "h200:1x1x8"])
def test_blocks_travel_while_their_forerunners_are_worked_on(target, backward, packed, monkeypatch, evidence):
    """In the body of each loop every send starts, the work is done, and every send ends; on TPU kernels do the work."""
    order = compiled(target, monkeypatch, backward=backward, packed=packed).order
    loops = [names for name, names in order.items() if START in names and not name.startswith("main")]
    late = 0
    for names in loops:
        place = names.index(WORK)
        late += names.count(WORK) - 1 + names[:place].count(DONE) + names[place:].count(START)
    evidence.record(late, 0)
    assert len(loops) == 1 + backward
    every = [name for names in order.values() for name in names]
    assert "collective-permute" not in every
    kernels = ["ring_attention_forward"] * 2 + ["attention_backward"] * 2 * backward
    assert sorted(name for name in every if "attention" in name) == sorted(kernels if target.startswith("v") else [])


@pytest.mark.parametrize(
    ("target", "dims"), [("v5e:2x2", (256, 256)), ("v6e:2x2", (192, 128)), ("tpu7x:2x2x1", (64, 64))]
)
def test_kernels_compile_for(target, dims, monkeypatch):
    """Wide heads, heads of two sizes and narrow ones fit the chips' vector memory, forward and backward."""
    order = compiled(target, monkeypatch, local=4096, dims=dims, backward=True).order
    assert sum("attention" in name for names in order.values() for name in names) >= 4


@evidence("C04", oracle="memory analysis of libtpu", code="pallas_kernels.ring_attention")
def test_memory_of_a_chip_does_not_grow_with_the_pod(monkeypatch, evidence):
    """The gradient of 8192 tokens a chip takes on 64 chips, 512 thousand tokens in all, what it takes on 4."""
    targets = ("v5p:2x2x1", "v5p:4x4x4")
    small, large = (compiled(name, monkeypatch, local=8192, backward=True).temporary_bytes for name in targets)
    evidence.record(large / small, 1.01)
