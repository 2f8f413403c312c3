"""What a mesh does to the arrays of a model: the axes it leaves whole, sizes that do not fit, bytes on each device."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from llmjax.parallel.mesh import MeshConfig, Names, fit, group_of, is_spec, placed, said


class Whole(NamedTuple):
    """An axis of an array that the table would split and whose length does not allow it."""

    path: str
    axis: int
    name: str
    length: int
    over: str
    """mesh axes and their sizes"""
    parts: int

    @property
    def why(self) -> str:
        """What is whole, and which lengths would not be."""
        return f"{self.name}={self.length} stays whole on {self.over}: a multiple of {self.parts} would be split"


def named(logical: Any, shapes: Any) -> Iterator[tuple[str, Names, tuple[int, ...]]]:
    """Path, logical names and shape of every array."""
    specs = jax.tree.leaves(logical, is_leaf=is_spec)
    for spec, (path, x) in zip(specs, jax.tree_util.tree_leaves_with_path(shapes), strict=True):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), tuple(spec), x.shape


def whole(logical: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> list[Whole]:
    """Every axis of every array that stays whole though its line of the table names a mesh axis of several devices."""
    found = []
    for path, names, shape in named(logical, shapes):
        for i, (name, length, axes) in enumerate(zip(names, shape, placed(names), strict=True)):
            sizes = {axis: mesh.shape[axis] for axis in group_of(axes)}
            parts = math.prod(sizes.values())
            if length % parts:
                found.append(Whole(path, i, str(name), length, said(sizes), parts))
    return found


def misfits(config: MeshConfig, logical: Any, shapes: Any) -> Iterator[tuple[str, str]]:
    """Mesh axis and reason for stages that the layers do not fill, and for axes that split no array of the tree."""
    arrays, mesh, pieces = list(named(logical, shapes)), config.abstract(), config.stage * config.rounds
    for repeats in {n for _, names, shape in arrays for name, n in zip(names, shape, strict=True) if name == "layers"}:
        if config.stage > 1 and repeats % pieces:
            rounds = f"times rounds={config.rounds} " if config.rounds > 1 else ""
            sizes = [n for n in range(1, repeats + 1) if repeats % (n * config.rounds) == 0] or [1]
            yield "stage", f"{rounds}does not divide the {repeats} repeats of the pattern: use {alternatives(sizes)}"
    with config.in_force():
        yield from unused(arrays, mesh)


def unused(arrays: list[tuple[str, Names, tuple[int, ...]]], mesh: AbstractMesh) -> Iterator[tuple[str, str]]:
    """Mesh axis and reason for each of expert and tensor that splits no array (over fsdp the batch is split too)."""
    split = {a for _, names, shape in arrays for part in fit(placed(names), shape, mesh) for a in group_of(part)}
    for axis in ("expert", "tensor"):
        if mesh.shape[axis] == 1 or axis in split:
            continue
        pairs = {pair for _, names, shape in arrays for pair in zip(names, shape, strict=True)}
        own = sorted((str(name), length) for name, length in pairs if axis in group_of(placed((name,))[0]))
        seen = ", ".join(f"{name}={length}" for name, length in own) or "none has such an axis"
        sizes = [n for n in range(1, mesh.shape[axis]) if n == 1 or any(length % n == 0 for _, length in own)]
        yield axis, f"splits no parameter ({seen}): use {alternatives(sizes)}"


def alternatives(sizes: Sequence[int]) -> str:
    """`1, 2 or 4`."""
    *most, last = map(str, sizes)
    return f"{', '.join(most)} or {last}" if most else last


def held(tree: Any) -> int:
    """Bytes that each device holds of a tree of arrays (or ShapeDtypeStructs) with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
