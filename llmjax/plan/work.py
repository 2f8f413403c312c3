"""What one chip computes and moves: FLOPs of matrix products and bytes of HBM traffic, instruction by instruction.

The compilers' own `cost_analysis()` counts a loop's body once and is empty for absent GPUs; here every instruction
counts as often as it runs. Elementwise arithmetic is not counted as FLOPs: its time is that of the bytes it moves.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, prod

import numpy as np

from llmjax.plan.collectives import classify, ends
from llmjax.plan.hlo import Instruction, Module

FREE = frozenset(
    {
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "partition-id", "replica-id"),
        *("while", "call", "conditional", "after-all", "add-dependency", "opt-barrier", "domain", "copy-done"),
        *("async-start", "async-update", "send", "send-done", "recv", "recv-done", "infeed", "outfeed"),
    }
)
"""Opcodes that neither compute nor move anything by themselves."""


@dataclass(frozen=True)
class Work:
    """One instruction that occupies the chip."""

    name: str
    computation: str
    times: float
    """Executions in one step."""
    flops: float
    """Of the matrix products of one execution."""
    nbytes: float
    """That one execution reads from and writes to HBM."""
    kernel: bool = False
    """Whether it is a kernel of ours, which tells its own FLOPs, rather than the compiler's matrix product."""
    cycles: int = 0
    """The TPU compiler's own estimate of one execution; 0 where it makes none (kernels, copies, other compilers)."""


def work(module: Module) -> Iterator[Work]:
    """Every instruction that is not a collective, as often as it runs."""
    for computation, times in module.runs():
        for one in module.computations.get(computation, ()):
            if one.opcode in FREE or ends(module, one) or classify(module, one)[0] is not None:
                continue
            kernel = one.opcode == "custom-call" and "__cublas" not in one.attributes
            said = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
            cycles = int(said[1]) if said else 0
            yield Work(one.name, computation, times, flops(module, one), traffic(module, one), kernel, cycles)


def flops(module: Module, one: Instruction) -> float:
    """FLOPs of the matrix products of one instruction, those fused into it included."""
    if one.opcode == "fusion":
        fused = (x for name in one.called("calls") for x in module.computations.get(name, ()))
        return sum(flops(module, inner) for inner in fused)
    if one.opcode == "dot":
        return dot_flops(module, one, "lhs_contracting_dims")
    if one.opcode == "convolution":
        return convolution_flops(module, one)
    if one.opcode != "custom-call":
        return 0.0
    if "__cublas" in one.attributes:
        return dot_flops(module, one, '"lhs_contracting_dimensions"')
    estimate = re.search(r'"cost_estimate":\{"flops":"?(\d+)', one.attributes)
    return float(estimate[1]) if estimate else 0.0


def dot_flops(module: Module, one: Instruction, attribute: str) -> float:
    """2 x elements of the result x length of what is summed over."""
    summed = re.search(rf'{attribute}[=:][{{\[]([\d,"]*)', one.attributes)
    left = module.operands(one)[0].shapes[0].dims
    depth = prod(left[int(axis)] for axis in re.findall(r"\d+", summed[1] if summed else ""))
    return 2.0 * prod(one.shapes[0].dims) * depth


def convolution_flops(module: Module, one: Instruction) -> float:
    """2 x batch x features in and out x pairs of positions that meet; XLA:TPU writes its matrix products this way."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        return 0.0
    image, kernel = (x.shapes[0].dims for x in module.operands(one)[:2])
    lhs, rhs, out = labels.groups()
    result = one.shapes[0].dims
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", one.attributes) or [""])[0]))
    spatial = sorted(label for label in out if label.isdigit())
    pairs = 1.0
    for i, label in enumerate(spatial):
        part = {name: value.split("x")[i] for name, value in window.items()}
        pairs *= meetings(image[lhs.index(label)], kernel[rhs.index(label)], result[out.index(label)], part)
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    batch, features = image[lhs.index("b")] / (int(groups[1]) if groups else 1), kernel[rhs.index("i")]
    return 2.0 * batch * features * kernel[rhs.index("o")] * pairs


def meetings(image: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of (position of the result, of the kernel) along one axis that fall on an element, not on padding."""
    stride, dilation, spread = (int(window.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    place = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * dilation - low
    return int(np.sum((place >= 0) & (place <= (image - 1) * spread) & (place % spread == 0)))


def traffic(module: Module, one: Instruction) -> float:
    """Bytes to and from HBM: operands and results, of slices and updates only the part that is touched."""
    operands = module.operands(one)
    written = sum(shape.nbytes for shape in one.shapes if shape.in_hbm)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written if hbm(operands[0]) else written
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(hbm(x) for x in operands[1:])
    if "AllocateBuffer" in one.attributes:
        return 0.0
    if one.opcode == "copy-start":
        return sum(shape.nbytes for shape in one.shapes[:2] if shape.in_hbm)
    if one.opcode == "slice-start":  # (source, slice, ...): only the slice is read, and written where it is in HBM
        return one.shapes[1].nbytes * (1 + one.shapes[1].in_hbm)
    if one.opcode == "slice-done":
        return 0.0
    if one.opcode != "fusion":
        return written + sum(hbm(x) for x in operands)
    read = sum(min(read_of(module, one, i), hbm(x)) for i, x in enumerate(operands))
    return read + written - saved(module, one)


def hbm(one: Instruction) -> float:
    """Bytes of a value that lie in HBM."""
    return sum(shape.nbytes for shape in one.shapes if shape.in_hbm)


def read_of(module: Module, fusion: Instruction, operand: int) -> float:
    """Bytes that a fusion reads of one operand: of one only sliced, the slices; of one updated in place, none."""
    body = module.computations.get(fusion.called("calls")[0], [])
    inner = next((x for x in body if x.opcode == "parameter" and x.attributes.startswith(f"{operand})")), None)
    names, read = {inner.name} if inner else set(), 0.0
    for one in body:
        used = [i for i, name in enumerate(one.operands) if name in names]
        if not used:
            continue
        if one.opcode == "bitcast":
            names.add(one.name)
        elif one.opcode == "fusion":
            read += sum(read_of(module, one, i) for i in used)
        elif one.opcode in ("dynamic-slice", "slice", "gather") and used == [0]:
            read += one.nbytes
        elif one.opcode != "dynamic-update-slice" or used != [0]:
            return inf
    return read


def saved(module: Module, fusion: Instruction) -> float:
    """Bytes of a fusion's results that are not written, because only a slice of them is updated in place."""
    total = 0.0
    for one in module.computations.get(fusion.called("calls")[0], []):
        if one.opcode == "dynamic-update-slice":
            updated = any(shape.in_hbm and shape.dims == one.shapes[0].dims for shape in fusion.shapes)
            total += (one.nbytes - module.operands(one)[1].nbytes) * updated
    return min(total, hbm(fusion))
