"""Real compiles for chips that are not there, against data sheets, instruction counts and sizes known beforehand."""

import dataclasses
from pathlib import Path

import pytest

from pallas_kernels._aot import CompileError, compile_for
from pallas_kernels.attention import tpu
from pallas_kernels.chips import CHIPS
from scripts import tune
from tests.evidence import evidence

BUILDERS = Path(__file__).with_name("aot_builders.py")
TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
HOPPER = "h200:1x1x1"


def compiled(target, builder, report=(), limits=None, **arguments):
    return compile_for(target, f"{BUILDERS}:{builder}", arguments, report=report, **(limits or {}))


@evidence(
    "C18", oracle="the makers' data sheets: peak FLOP/s and memory bandwidth", code="pallas_kernels._aot.compile_for"
)
@pytest.mark.parametrize(("target", "bandwidth"), [("v5e:2x2", 819e9), ("v5p:2x2x1", 2765e9), ("v6e:2x2", 1640e9)])
def test_estimated_cycles_of_a_matmul_agree_with_the_roofline(target, bandwidth, evidence):
    """Not below the arithmetic at its peak, nor 10 % above arithmetic and transfers one after the other."""
    side = 2048
    (chip,) = [chip for chip in CHIPS if target.startswith(chip.name)]
    cycles = compiled(target, "matmul", ("cycles",), side=side).total_cycles
    arithmetic = 2 * side**3 / chip.flops
    transfer = 3 * side**2 * 2 / bandwidth
    excess = cycles * chip.flops_per_cycle / (2 * side**3) - 1
    evidence.record(excess, tolerance=transfer / arithmetic + 0.1)


@evidence("C18", oracle="bytes of the arrays' shapes", code="pallas_kernels._aot.compile_for")
@pytest.mark.parametrize("target", [*TPUS, HOPPER])
def test_bytes_are_those_of_the_arrays(target, evidence):
    report = compiled(target, "matmul", side=256)
    sizes = (report.argument_bytes, report.output_bytes)
    evidence.record(max(abs(found - want) for found, want in zip(sizes, (2 * 256**2 * 2, 256**2 * 2))), tolerance=0)
    assert report.lower_seconds > 0
    assert report.compile_seconds > 0


def test_tpu_kernel_reports_slots_and_cycles():
    """A kernel called twice costs twice; its matrix unit and its exponentials are seen at work."""
    once = compiled("v5p:2x2x1", "tpu_kernel", ("cycles", "slots"), rows=512)
    twice = compiled("v5p:2x2x1", "tpu_kernel", ("cycles",), rows=512, copies=2)
    assert twice.total_cycles == 2 * once.total_cycles > 0
    assert [name.split(".")[0] for name in once.slots] == ["tiny"]
    (slots,) = once.slots.values()
    assert slots.bundles > 100
    # 256 x 512 exponentials of 1024 lanes each are 128 instructions in the one EUP slot (and a reshape may add some).
    assert 128 <= slots.used["EUP"] * slots.bundles <= 140
    assert all(0 <= share <= 1 for share in slots.used.values())
    assert slots.used["VSTORE:SPILL"] <= slots.used["VSTORE"]
    assert [call.split(":")[0] for call in once.order["main.1"]] == ["tpu_custom_call"]
    assert twice.temporary_bytes == 512 * 512 * 4


@pytest.mark.parametrize("target", TPUS)
def test_slots_are_dumped_for_every_tpu(target):
    (slots,) = compiled(target, "tpu_kernel", ("slots",), rows=256).slots.values()
    assert slots.used["MXU"] > 0


def test_gpu_kernel_spills_only_where_registers_run_out():
    """Three rows of 8 numbers a thread fit 255 registers; three rows of 128 cannot."""
    (small,) = compiled(HOPPER, "gpu_kernel", ("registers",), width=8).kernels
    (large,) = compiled(HOPPER, "gpu_kernel", ("registers",), width=128).kernels
    assert small.name == large.name == "rows_mosaic_gpu_kernel"
    assert small.registers < 128
    assert (small.spill_store_bytes, small.spill_load_bytes) == (0, 0)
    assert large.registers == 255
    assert min(large.spill_store_bytes, large.spill_load_bytes) > 3 * 128 * 4 - 255 * 4
    assert not small.notes


def test_tensor_core_instructions_are_counted():
    """A depth of 64 is 4 wgmma of depth 16; XLA's own small product uses the warps' mma."""
    product = compiled(HOPPER, "gpu_product", ("registers",), columns=128)
    assert (product.wgmma, product.mma_sync, product.spill_bytes) == (4, 0, 0)
    xla = compiled(HOPPER, "matmul", ("registers",), side=256)
    assert xla.wgmma + xla.mma_sync > 0


def test_serialised_products_are_noted():
    """Two sums of 64 x 256 numbers want 256 registers a thread: ptxas must put one product after the other."""
    (one,) = compiled(HOPPER, "gpu_product", ("registers",), columns=256).kernels
    (two,) = compiled(HOPPER, "gpu_product", ("registers",), columns=256, sums=2).kernels
    assert one.notes == ()
    assert any("serialized" in note for note in two.notes)


@pytest.mark.parametrize("target", ["v5p:2x2x1", "h200:1x1x4"])
def test_collectives_come_in_schedule_order(target):
    order = [name for names in compiled(target, "ring", side=256).order.values() for name in names]
    kinds = [name.split(":")[0].removesuffix("-start") for name in order if "-done" not in name]
    assert [kind for kind in kinds if kind.startswith(("collective", "all"))] == ["collective-permute", "all-reduce"]


@pytest.mark.parametrize(
    ("builder", "limits", "message"),
    [
        ("tpu_too_large", {}, "(?i)vmem"),
        ("dies", {}, "signal SIGABRT"),
        ("hungry", {"memory_limit": 2**30}, "MemoryError|Unable to allocate"),
        ("absent", {}, "KeyError: 'absent'"),
        ("dies", {"time_limit": 0.1}, "not compiled within 0.1 s"),
    ],
)
def test_what_ends_badly_is_told(builder, limits, message):
    """Out of vector memory, an aborted process, too much memory, an exception, too much time."""
    with pytest.raises(CompileError, match=message):
        compiled("v5p:2x2x1", builder, limits=limits)


@pytest.mark.parametrize(("target", "report"), [(HOPPER, "cycles"), (HOPPER, "slots"), ("v5p:2x2x1", "registers")])
def test_an_empty_report_is_an_error(target, report):
    """A gate on the cycles of a GPU must not pass because there are none."""
    with pytest.raises(CompileError, match=f"left no {report}"):
        compiled(target, "matmul", (report,), side=256)


def test_a_candidate_of_the_tuner_is_estimated():
    """The tuner's own program: twice the keys and queries cost about four times as much, never less than twice."""
    config = dataclasses.asdict(tpu.Config(block_q=256, block_k=256, compute=256))
    cycles = []
    for length in (512, 1024):
        problem = dict(length=length, head_dim=128, value_dim=128, causal=False)
        cost, unit = tune.estimate("v5p", dict(kernel="tpu", direction="forward", problem=problem, config=config))
        assert unit == "cycles"
        cycles.append(cost)
    assert 2 < cycles[1] / cycles[0] < 5
