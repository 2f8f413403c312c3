"""Optimised HLO text as computations of instructions, and how often each of them runs in one execution.

`compiled.as_text()` of XLA:TPU, XLA:GPU and XLA:CPU. A loop's body counts as often as the loop turns: the compiler's
own `known_trip_count` where it gives one, else the bound that the loop's condition compares its counter with.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

NARROW = {"pred": 8, "token": 0, "c64": 64, "c128": 128}
"""Bits of the element types whose names do not begin with kind and width."""


@dataclass(frozen=True)
class Shape:
    """One array: element type, sizes, and whether it lies in the main memory (HBM)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def nbytes(self) -> float:
        """Bytes without padding; types below a byte count their part of one."""
        width = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = NARROW[self.dtype] if self.dtype in NARROW else int(width[1]) if width else 0
        return prod(self.dims) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result, the leaves of a tuple in order."""
    operands: tuple[str, ...]
    attributes: str
    """All that follows the operands."""
    root: bool

    def called(self, *attributes: str) -> list[str]:
        """The computations named by attributes such as `body` or `calls`."""
        found = [re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.-]+)", self.attributes) for name in attributes]
        return [name for match in found if match for name in re.findall(r"[\w.-]+", match[1])]

    @property
    def nbytes(self) -> float:
        """Bytes of the result."""
        return sum(shape.nbytes for shape in self.shapes)


class Module:
    """A parsed module: `computations` by name, each a list in schedule order; `entry` is the one that runs first."""

    def __init__(self, text: str) -> None:
        """Parse; raises ValueError where there is no entry computation."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$", line)
            if head and not line.startswith("HloModule"):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif found := instruction(line):
                current.append(found)
        if not self.entry:
            raise ValueError("no ENTRY computation: this is no text of an HLO module")

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction; names are unique in a module."""
        return {one.name: one for body in self.computations.values() for one in body}

    def operands(self, one: Instruction) -> list[Instruction]:
        """The instructions that `one` reads."""
        return [self.by_name[name] for name in one.operands if name in self.by_name]

    def runs(self) -> Iterator[tuple[str, float]]:
        """(computation, executions) of all that is not fused into one instruction; a branch counts as taken."""
        yield from self._runs(self.entry, 1.0)

    def _runs(self, name: str, times: float) -> Iterator[tuple[str, float]]:
        yield name, times
        for one in self.computations.get(name, ()):
            if one.opcode == "while":
                yield from self._runs(one.called("body")[0], times * (self.trips(one) or 1))
            elif one.opcode in ("call", "conditional"):
                attributes = ("to_apply", "calls", "branch_computations", "true_computation", "false_computation")
                for called in one.called(*attributes):
                    yield from self._runs(called, times)

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop turns; None where the text does not say."""
        known = re.search(r'known_trip_count":\s*\{"n":\s*"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.called("condition")[0], [])
        bounds = [value for one in condition if (value := constant(one)) is not None]
        compared = [one for one in condition if one.root and "direction=LT" in one.attributes]
        if len(bounds) != 1 or not compared:
            return None
        return max(bounds[0] - self._first(loop, condition), 0)

    def _first(self, loop: Instruction, condition: list[Instruction]) -> int:
        """The value that the counter of a loop starts from, 0 where it cannot be traced to a constant."""
        index = next(
            (re.search(r"index=(\d+)", one.attributes) for one in condition if "index=" in one.attributes), None
        )
        given = self.operands(loop)
        if index is None or not given or given[0].opcode != "tuple":
            return 0
        start = self.by_name.get(given[0].operands[int(index[1])])
        while start is not None and start.opcode in ("copy", "bitcast", "convert") and self.operands(start):
            start = self.operands(start)[0]
        return (constant(start) if start is not None else None) or 0


def instruction(line: str) -> Instruction | None:
    """The instruction on a line, None where there is none."""
    match = re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*?)\s([a-z][\w-]*)\(", line)
    if match is None:
        return None
    depth, end = 1, match.end()
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    inside, after = line[match.end() : end - 1], line[end:]
    names = () if match[4] in ("constant", "parameter") else tuple(re.findall(r"%([\w.-]+)", inside))
    attributes = f"{inside}){after}" if match[4] in ("constant", "parameter") else after
    return Instruction(match[2], match[4], shapes(match[3]), names, attributes, bool(match[1]))


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type; `S(n)` in a layout is a memory beside the main one (TPU's VMEM, the host's)."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?", text)
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout) for dtype, dims, layout in found
    )


def constant(one: Instruction) -> int | None:
    """The value of a scalar integer constant."""
    value = re.match(r"(-?\d+)\)", one.attributes) if one.opcode == "constant" else None
    return int(value[1]) if value and one.shapes and not one.shapes[0].dims else None
