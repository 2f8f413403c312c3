"""Reading compiled programs: collectives and products of programs whose counts are known, on 8 fake CPU devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.plan.collectives import axis_of, collectives, first_group, sent_share
from llmjax.plan.hlo import Module, instruction, shapes
from llmjax.plan.program import windows
from llmjax.plan.work import flops, meetings, traffic, work

pytestmark = pytest.mark.devices(8)

LAYERS, ROWS, WIDTH = 5, 16, 32
SIZES = {"data": 2, "fsdp": 4}
F32 = 4


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), tuple(SIZES))


def compiled(function, mesh, *arguments):
    structs = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
    return jax.jit(function).lower(*structs).compile().as_text()


@pytest.fixture
def scanned(mesh):
    """A scan over layers: each turn gathers a weight along fsdp, multiplies, and sums along data."""

    def body(x, w):
        w = jax.lax.all_gather(w, "fsdp", tiled=True)
        return jax.lax.psum(x @ w, "data") / 2, None

    def per_device(x, w):
        x = jax.lax.scan(body, x, w)[0]
        x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True)

    specs = dict(in_specs=(P("fsdp"), P(None, "fsdp")), out_specs=P("fsdp"))
    function = jax.shard_map(per_device, mesh=mesh, check_vma=False, **specs)
    return Module(compiled(function, mesh, ((ROWS, WIDTH), P("fsdp")), ((LAYERS, WIDTH, WIDTH), P(None, "fsdp"))))


def test_collectives_count_as_often_as_their_loop_turns(scanned):
    """Exact: each of 5 turns gathers 3 shards of 8 x 32 floats and sends 2 (n-1)/n of 4 x 32 for the sum over 2."""
    found = {}
    for one in collectives(scanned, 8):
        kind = one.kind, axis_of(one.group, SIZES)
        times, sent = found.get(kind, (0, 0))
        found[kind] = times + one.times, sent + one.times * one.nbytes
    activations = ROWS // 4 * WIDTH * F32
    assert found == {
        ("all-gather", "fsdp"): (LAYERS, LAYERS * 3 * WIDTH // 4 * WIDTH * F32),
        ("all-reduce", "data"): (LAYERS, LAYERS * activations),
        ("collective-permute", "fsdp"): (1, activations),
        ("all-to-all", "fsdp"): (1, activations * 3 / 4),
    }


def test_products_count_as_often_as_their_loop_turns(scanned):
    """Exact: 2 rows x width x width in each of 5 turns, on the rows of one device."""
    assert sum(one.times * one.flops for one in work(scanned)) == LAYERS * 2 * ROWS // 4 * WIDTH * WIDTH


def test_nested_loops_multiply(mesh):
    """3 turns of 4 turns: 12 products."""

    def inner(x, _):
        return jnp.sin(x @ x), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=4)[0], None

    module = Module(compiled(lambda x: jax.lax.scan(outer, x, None, length=3)[0], mesh, ((8, 8), P())))
    assert sum(one.times * one.flops for one in work(module)) == 12 * 2 * 8**3


def test_gradients_of_sharded_weights_are_counted_along_their_axes(mesh):
    """GSPMD's own collectives: the gradient of a replicated weight is summed once over all 8 devices, W^2 floats."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    text = compiled(jax.grad(loss), mesh, ((WIDTH, WIDTH), P()), ((ROWS, WIDTH), P(("data", "fsdp"))))
    (one,) = collectives(Module(text), 8)
    assert (one.kind, axis_of(one.group, SIZES), one.times) == ("all-reduce", "data+fsdp", 1)
    assert one.nbytes == 2 * 7 / 8 * WIDTH * WIDTH * F32


TPU = """HloModule step, is_scheduled=true, entry_computation_layout={(s32[], bf16[8,64]{1,0})->bf16[8,64]{1,0}}

%cond (p: (s32[], bf16[8,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(9)
  %p = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (input: bf16[64,64]) -> bf16[8,64] {
  %input = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.5 = bf16[64,64]{1,0} all-reduce(%input), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
  ROOT %ds = bf16[8,64]{1,0} dynamic-slice(%all-reduce.5, %input), dynamic_slice_sizes={8,64}
}

%body (q: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %q = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %start = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %fast = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %done = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  %conv = bf16[8,64]{1,0} convolution(%fast, %done), dim_labels=bf_io->bf
  %kernel = bf16[8,64]{1,0} custom-call(%conv), backend_config={"body":"x","cost_estimate":{"flops":"1234"}}
  %scatter = bf16[8,64]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%q, %scatter)
}

ENTRY %main (a: bf16[8,64]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(2)
  %tuple = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %while = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) while(%tuple), condition=%cond, body=%body
  ROOT %out = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""
"""What XLA:TPU writes and XLA:CPU does not: no trip count, products as convolutions, reduce-scatter as a fusion."""


def test_what_only_the_tpu_compiler_writes():
    """Exact: from 2 to 9 are 7 turns; group 0, 2, 4, 6 of the transposed mesh; VMEM is no traffic."""
    module = Module(TPU)
    gather, scatter = collectives(module, 8)
    assert (gather.kind, gather.times, gather.nbytes, gather.asynchronous) == ("all-gather", 7, 7 * 8 * 64 * 2, True)
    assert gather.group == tuple(range(8))
    assert (scatter.kind, scatter.nbytes, scatter.asynchronous) == ("reduce-scatter", 3 / 4 * 64 * 64 * 2, False)
    assert scatter.group == (0, 1, 2, 3)
    assert flops(module, module.by_name["conv"]) == 2 * 8 * 64 * 64
    assert flops(module, module.by_name["kernel"]) == 1234
    assert traffic(module, module.by_name["fast"]) == 8 * 64 * 2
    assert traffic(module, module.by_name["conv"]) == (64 * 64 + 8 * 64) * 2


ASYNC = """HloModule step, is_scheduled=true

%begin (p: bf16[8,64]) -> (bf16[8,64], bf16[64,64]) {
  %p = bf16[8,64]{1,0} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %custom-call.1 = (bf16[8,64], bf16[64,64]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (r: bf16[8,64], s: bf16[64,64]) -> bf16[8,64] {
  %r = bf16[8,64]{1,0} parameter(0)
  %s = bf16[64,64]{1,0} parameter(1)
  %all-gather.2 = bf16[64,64]{1,0} all-gather(%r), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %conv = bf16[8,64]{1,0} convolution(%r, %s), dim_labels=bf_io->bf
}

%end (u: bf16[64,64]) -> bf16[64,64] {
  %u = bf16[64,64]{1,0} parameter(0)
  ROOT %custom-call.2 = bf16[64,64] custom-call(%u), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[8,64], b: bf16[64,64]) -> bf16[64,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[64,64]{1,0} parameter(1)
  %first = (bf16[8,64], bf16[64,64]) fusion(%a), kind=kCustom, calls=%begin
  %between = bf16[8,64]{1,0} fusion(%a, %b), kind=kOutput, calls=%async_collective_fusion.1
  %last = bf16[64,64]{1,0} fusion(%between), kind=kCustom, calls=%end
  ROOT %after = bf16[64,64]{1,0} copy(%last)
}
"""
"""A collective that XLA:TPU spreads over three fusions, the middle one a product."""


def test_a_collective_fused_into_what_runs_meanwhile():
    """One gather, under way during the product and not during the copy; the product counts as work."""
    module = Module(ASYNC)
    (one,) = collectives(module, 8)
    assert (one.name, one.kind, one.nbytes, one.asynchronous) == ("first", "all-gather", 7 * 8 * 64 * 2, True)
    assert windows(module)("main") == {"between"}
    assert {x.name: x.flops for x in work(module)} == {"between": 2 * 8 * 64 * 64, "after": 0}


GROUPS = {
    "replica_groups={{0,3},{1,2}}": (0, 3),
    "replica_groups=[4,2]<=[8]": (0, 1),
    "replica_groups=[2,4]<=[4,2]T(1,0)": (0, 2, 4, 6),
    "replica_groups=mesh['x'=2,'y'=4] {'y'}": (0, 1, 2, 3),
    "replica_groups=mesh['x'=2,'y'=4] {'x','y'}": tuple(range(8)),
    "replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}": (0, 2),
    "replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}": (0, 1),
    "replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}": (0, 4),
    "replica_groups={}": tuple(range(8)),
    "source_target_pairs={{0,1},{1,2},{2,0},{4,5}}": (0, 1, 2),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_in_every_form(text):
    """The forms of XLA's HloInstruction printer; by hand."""
    one = instruction(f"  %r = f32[4]{{0}} all-reduce(%a), {text}, to_apply=%add")
    assert first_group(one, 8) == GROUPS[text]


def test_shapes_and_their_bytes():
    """Exact: bits of a type, tuples, and the memory a layout names."""
    found = shapes(
        "(bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/s4[10]{0}, pred[]{:T(512)}, f8e4m3fn[8]{0:S(1)}, token[])"
    )
    assert [x.nbytes for x in found] == [12, 5, 1, 8, 0]
    assert [x.in_hbm for x in found] == [True, True, True, False, True]


def test_meetings_of_a_convolution():
    """Against numpy: positions of a convolution with padding, stride and dilation that fall on the image."""
    for image, kernel, stride, spread, low, high in ((7, 3, 1, 1, 1, 1), (5, 3, 2, 1, 0, 0), (4, 4, 1, 2, 3, 3)):
        wide = np.zeros((image - 1) * spread + 1)
        wide[::spread] = 1
        padded = np.pad(wide, (low, high))
        out = (len(padded) - kernel) // stride + 1
        counted = sum(padded[i * stride + k] for i in range(out) for k in range(kernel))
        window = {"stride": str(stride), "lhs_dilate": str(spread), "pad": f"{low}_{high}"}
        assert meetings(image, kernel, out, window) == counted


def test_slices_of_a_stack_are_what_a_loop_reads(mesh):
    """A scan over stacked weights reads each once: all turns together less than 4 times the stack, not its square."""
    stack = 64 * WIDTH * WIDTH * F32

    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    module = Module(compiled(run, mesh, ((4, WIDTH), P()), ((64, WIDTH, WIDTH), P())))
    moved = sum(one.times * one.nbytes for one in work(module))
    assert stack <= moved < 4 * stack


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("nothing")


def test_ring_algorithms_send_what_the_textbook_says():
    """Chan et al. 2007, table 1: n blocks of b bytes."""
    n, b = 4, 100
    assert sent_share("all-gather", n) * b == 300
    assert sent_share("reduce-scatter", n) * n * b == 300
    assert sent_share("all-reduce", n) * n * b == 600
    assert sent_share("collective-permute", n) * b == 100


def test_the_reader_agrees_with_the_compiler_where_nothing_loops(mesh):
    """XLA's own count of FLOPs of a program without loops; 1 %, because it counts the tanh and the sum too."""
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 128), (128, 256), (256, 512))]
    done = jax.jit(lambda x, v, w: jnp.tanh(x @ v) @ w).lower(*structs).compile()
    own = sum(one.times * one.flops for one in work(Module(done.as_text())))
    assert own == pytest.approx(done.cost_analysis()["flops"], rel=0.01)
    assert not re.search("while", done.as_text())
