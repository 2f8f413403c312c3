"""Which modules of transformers hold our projections, and how a tensor of theirs lies beside a weight.

One pattern a tensor serves all families: `r I -> I r`, where I are the axes of a projection's inputs, O those of its
outputs, r the rank; the base's table of tensors (`llmjax.models`) says in which order those axes stand in a module.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from llmjax.models.families import family_of
from llmjax.models.mapping import Entry, Row, layout, rows
from llmjax.nn.model import Model
from llmjax.nn.projections import Projection, projections

PREFIX = "base_model.model."
"""what peft puts before the name of a module"""
SHARED = "base_model."
"""what it puts before that of a parameter of the whole adapter"""
TIED = "embed/embedding"
"""our table of tokens, which may be the head too"""


class Part(NamedTuple):
    """One parameter of an adapter, ours and theirs."""

    leaf: str
    """our name"""
    key: str
    """their name, after the module's"""
    pattern: str
    """from their axes to ours; I and O are those of a projection's inputs and outputs"""
    sign: float = 1.0
    """-1 where theirs is the negative of ours"""


class Module(NamedTuple):
    """A module of transformers whose weight is one projection of ours, or several side by side."""

    name: str
    row: Row
    projections: tuple[Projection, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Our modules."""
        return tuple(path.rpartition("/")[0] for path in self.row.paths)

    @property
    def ordered(self) -> bool:
        """Whether the axes of inputs, and those of outputs, stand in the order of ours."""
        form = layout(self.row.entry.pattern)
        inner = {axis for group in form.merged[: len(self.projections[0].inputs)] for axis in group}
        theirs, ours = (sorted(axes, key=lambda axis: axis in inner) for axes in (form.theirs, form.ours))
        return theirs == ours

    def entry(self, part: Part) -> Entry:
        """Where a parameter of an adapter stands: the weight's pattern, cut to the axes that `part` has."""
        left, right = (_words(side) for side in self.row.entry.pattern.split("->"))
        count = len(self.projections[0].inputs)
        inner = set(re.findall(r"\w+", " ".join(right[:count])))
        theirs = {"IO"[not set(re.findall(r"\w+", word)) <= inner]: word for word in left}
        ours = {"I": " ".join(right[:count]), "O": " ".join(right[count:])}
        before, after = part.pattern.split("->")
        return Entry(self.paths, part.key, f"{_filled(before, theirs)}->{_filled(after, ours)}", self.row.entry.sizes)


def _words(side: str) -> list[str]:
    return re.findall(r"\[[^\]]*\]|\([^)]*\)|\S+", side)


def _filled(side: str, axes: Mapping[str, str]) -> str:
    return f" {' '.join(axes.get(word, word) for word in side.split())} "


def modules_of(base: Model) -> dict[str, Module]:
    """The modules of transformers that hold our projections, by name; raises InputError where no family fits."""
    family, found = family_of(base), projections(base)
    result = {}
    for row in rows(base, family):
        own = tuple(found.get(path.rpartition("/")[0]) for path in row.paths)
        if getattr(base, "tied", False) and row.paths == (TIED,):
            continue  # peft adapts the look-ups and not the head that shares the table
        if all(p is not None and path.endswith(f"/{p.leaf}") for p, path in zip(own, row.paths, strict=True)):
            name = row.name.removesuffix(".weight")
            result[name] = Module(name, row, tuple(p for p in own if p is not None))
    return result


def innermost(model: Model) -> Model:
    """The model inside all that wraps it."""
    while hasattr(model, "base"):
        model = model.base
    return model
