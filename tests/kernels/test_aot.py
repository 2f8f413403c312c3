"""The readers of compiler dumps on short excerpts of real ones, and the names of chips."""

import pytest

from pallas_kernels._aot import Kernel, compile_for
from pallas_kernels._aot.dumps import gpu_kernels, hlo_order, tensor_core_instructions, tpu_cycles, tpu_slots
from pallas_kernels.chips import absent_devices, chip_of

PTXAS = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function 'flash_mosaic_gpu_kernel'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'flash_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for flash_mosaic_gpu_kernel
    1368 bytes stack frame, 1864 bytes spill stores, 2108 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers
ptxas info    : Compile time = 22.160 ms
ptxas info    : Compiling entry function 'wrapped_broadcast' for 'sm_90a'
ptxas info    : Function properties for wrapped_broadcast
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers
"""

HLO = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0:T(128)})->f32[8]{0:T(128)}}

%body (arg.1: (f32[8,4], f32[8,4])) -> (f32[8,4], f32[8,4]) {
  %arg.1 = (f32[8,4]{1,0:T(8,128)}, /*index=1*/f32[8,4]{1,0:T(8,128)}) parameter(0)
  %collective-permute-start.1 = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0:T(8,128)}) collective-permute-start(%get.1), \
channel_id=1
  %flash.3 = f32[8,4]{1,0:T(8,128)S(1)} custom-call(%get.1), custom_call_target="tpu_custom_call"
  %fusion = f32[8,4]{1,0:T(8,128)} fusion(%flash.3), kind=kLoop, calls=%all-gather-looks-like-this
  ROOT %collective-permute-done.1 = f32[8,4]{1,0:T(8,128)} collective-permute-done(%collective-permute-start.1)
}

ENTRY %main.1 (a.1: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0:T(128)} parameter(0)
  ROOT %all-reduce.5 = f32[8]{0:T(128)} all-reduce(%a.1), to_apply=%add
}
"""

PROFILE = """\
hlo_op_estimate {
  hlo_op_name: "little.1"
  estimated_cycles: 7823
  num_equivalent_hlos: 2
  dma_instruction_type: DMA_INSTRUCTION_TYPE_LOCAL
}
"""

BUNDLES = """\
== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 1
4 0 2 0 1 0 0 0 0 2
2 0 0 1 0 0 0 1 1 0
0 3 4 0 0 3 0 1 0 0
"""


def test_ptxas_notes_are_read():
    flash, broadcast = gpu_kernels(PTXAS)
    note = "wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline"
    assert flash == Kernel("flash_mosaic_gpu_kernel", 255, 1864, 2108, 1368, 2, (note,))
    assert broadcast == Kernel("wrapped_broadcast", 10, 0, 0, 0, 0, ())
    assert gpu_kernels("ptxas info    : 0 bytes gmem\n") == ()


def test_matrix_instructions_are_counted_by_generation():
    ptx = """
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 1;
    wgmma.commit_group.sync.aligned;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
    """
    assert tensor_core_instructions(ptx) == (1, 2)


def test_order_is_kept_apart_for_loop_bodies():
    assert hlo_order(HLO) == {
        "body": (
            "collective-permute-start:collective-permute-start.1",
            "tpu_custom_call:flash.3",
            "collective-permute-done:collective-permute-done.1",
        ),
        "main.1": ("all-reduce:all-reduce.5",),
    }


def test_cycles_of_equal_operations_are_multiplied_out():
    other = PROFILE.replace("little.1", "fusion").replace("num_equivalent_hlos: 2\n", "")
    assert tpu_cycles([PROFILE, other]) == {"little.1": 2 * 7823, "fusion": 7823}
    assert tpu_cycles([]) == {}


def test_slot_use_is_a_share_of_capacity(tmp_path):
    for name in ("little.1-70", "<late-finalization>-66", "TLP-12"):
        path = tmp_path / f"1795191887-{name}-final_hlo-static-per-bundle-utilization.txt"
        path.write_text(BUNDLES)
    (tmp_path / "1795191887-little.1-72-final_bundles.txt").write_text("not a table")
    (name,) = slots = tpu_slots(tmp_path)
    assert name == "little.1"
    assert slots[name].bundles == 4
    used = slots[name].used
    assert used["MXU"] == 6 / 16
    assert used["VALU"] == 6 / 16
    assert used["VSTORE"] == 2 / 4
    assert used["VSTORE:SPILL"] == 1 / 4
    assert used["SALU"] == 3 / 8


def test_unknown_reports_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"report=\['cylces'\].*cycles, slots, registers"):
        compile_for("v5p:2x2x1", "nowhere:nothing", report=("cylces",))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h200"),
        ("NVIDIA H200 141GB HBM3e", "h200"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("cpu", None),
    ],
)
def test_chips_are_known_by_the_kinds_that_jax_gives(kind, name):
    chip = chip_of(kind)
    assert (chip and chip.name) == name


@pytest.mark.parametrize("target", ["v5p", "v5p:", "h200:1xtwo"])
def test_targets_of_another_form_are_refused(target):
    with pytest.raises(ValueError, match="chip:AxBxC"):
        absent_devices(target)
