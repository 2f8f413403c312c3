"""Readers of what the compilers leave behind: HLO text, the TPU's schedule dumps, ptxas' notes on GPU kernels."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-", "ragged-all-to-all", "reduce-scatter")


@dataclass(frozen=True)
class Kernel:
    """One GPU kernel as ptxas compiled it: counts a thread, spill bytes a thread."""

    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    barriers: int
    notes: tuple[str, ...] = ()
    """ptxas' warnings about this kernel, such as "wgmma.mma_async instructions are serialized due to ..."."""


@dataclass(frozen=True)
class Slots:
    """The bundles (VLIW words) of one TPU kernel, each counted once, however often a loop runs it."""

    bundles: int
    used: dict[str, float]
    """Share of a slot's capacity that is filled, by the compiler's slot name: MXU, XLU, VALU, EUP, VSTORE, ...
    "VSTORE:SPILL" and "VLOAD:FILL" are the parts of VSTORE and VLOAD that move spilled registers."""


def hlo_order(text: str) -> dict[str, tuple[str, ...]]:
    """Collectives and custom calls of each computation in schedule order, as "opcode:name" or "target:name".

    `text` is a scheduled HLO module (`compiled.as_text()`); a loop's body is a computation of its own. Computations
    that hold neither are left out.
    """
    order: dict[str, list[str]] = {}
    computation = ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            computation = head[1]
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*?\s([a-z][\w-]*)\(", line)
        if not instruction:
            continue
        name, opcode = instruction.groups()
        target = re.search(r'custom_call_target="([^"]*)"', line) if opcode == "custom-call" else None
        if target or opcode.startswith(COLLECTIVES):
            order.setdefault(computation, []).append(f"{target[1] if target else opcode}:{name}")
    return {name: tuple(found) for name, found in order.items()}


def tpu_cycles(texts: Iterable[str]) -> dict[str, int]:
    """Estimated cycles by HLO operation, from the texts of a static LLO profile; equal operations are multiplied out.

    The compiler simulates a kernel's grid; an operation in an XLA loop is counted once, and a trip count that is known
    only at run time counts as about 1.
    """
    cycles: dict[str, int] = {}
    entry = re.compile(r'hlo_op_name: "([^"]+)"\s*estimated_cycles: (\d+)(?:\s*num_equivalent_hlos: (\d+))?')
    for text in texts:
        for name, count, equal in entry.findall(text):
            cycles[name] = cycles.get(name, 0) + int(count) * int(equal or 1)
    return cycles


def tpu_slots(folder: Path) -> dict[str, Slots]:
    """Slot use by HLO operation, from the `final_hlo-static-per-bundle-utilization` files of an LLO dump."""
    slots = {}
    for path in sorted(folder.glob("*final_hlo-static-per-bundle-utilization.txt")):
        name = re.fullmatch(r"\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization.txt", path.name)
        # The program's own prologue and epilogue are named <late-...> and TLP.
        if name and not name[1].startswith(("<", "TLP")):
            slots[name[1]] = _utilization(path.read_text())
    return slots


def _utilization(text: str) -> Slots:
    """The table of one kernel: slot names, their capacities, then a line of counts for each bundle."""
    _, names, capacities, _, *bundles = text.strip().splitlines()
    rows = [[int(count) for count in line.split()] for line in bundles]
    filled = [sum(column) for column in zip(*rows)]
    used = {
        name.strip(): count / (int(capacity) * len(rows))
        for name, capacity, count in zip(names.split(","), capacities.split(), filled)
    }
    return Slots(len(rows), used)


def gpu_kernels(text: str) -> tuple[Kernel, ...]:
    """The kernels in what `ptxas -v` printed (Mosaic GPU prints the same text when it is asked to)."""
    kernels = []
    for part in re.split(r"Compiling entry function (?=')", text)[1:]:
        bytes_ = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(?:, used (\d+) barriers)?", part)
        if not bytes_ or not used:
            continue
        stack, stores, loads = map(int, bytes_.groups())
        name = part.split("'")[1]
        notes = re.findall(rf"Potential Performance Loss: (.*) (?:in|for) the function '{re.escape(name)}'", text)
        kernels.append(Kernel(name, int(used[1]), stores, loads, stack, int(used[2] or 0), tuple(dict.fromkeys(notes))))
    return tuple(kernels)


def tensor_core_instructions(ptx: str) -> tuple[int, int]:
    """How many `wgmma.mma_async` (Hopper) and `mma.sync` (Ampere) instructions stand in a PTX text."""
    return len(re.findall(r"\bwgmma\.mma_async", ptx)), len(re.findall(r"\bmma\.sync", ptx))
