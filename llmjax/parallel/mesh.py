"""The device mesh and the table from logical axis names to mesh axes.

Parameters carry logical names (`nn.with_logical_partitioning`); GSPMD (Xu et al. 2021, 2105.04663) does the rest.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from llmjax.config import InputError, did_you_mean

Names = tuple[str | None, ...]
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

AXES = ("data", "fsdp", "stage", "context", "expert", "tensor")

RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("buffers", ("data", "fsdp")),  # rows of what each expert gets: `batch`, less the axis of the experts
    ("length", "context"),
    ("vocab", "tensor"),
    ("d_model", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("d_ff", "tensor"),
    ("d_inner", "tensor"),
    ("experts", "expert"),
    ("layers", "stage"),
    ("head_dim", None),
    ("d_state", None),
    ("rank", None),
    ("taps", None),
    ("entries", None),
    ("positions", None),
    ("norm", None),
)
"""One logical axis a line; an axis goes to the first free mesh axis (or axes) named for it."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each of six axes; their product is the number of devices used."""

    data: int = 1
    """replicas of the parameters; the batch is split over them. 0 takes all devices that the other axes leave"""
    fsdp: int = 1
    """parts that parameters and optimizer state are split into; the batch is split over them too (2304.11277)"""
    stage: int = 1
    """parts that the stack of layers is split into"""
    context: int = 1
    """parts that the sequence is split into"""
    expert: int = 1
    """parts that the experts are split into"""
    tensor: int = 1
    """parts that heads, hidden width and vocabulary are split into"""
    slices: int = 1
    """groups of devices with a slow network between them (TPU slices, GPU nodes): only `data` is split over them"""
    microbatches: int = 1
    """parts of a batch that follow each other through the stages: the more, the less a stage waits"""
    rounds: int = 1
    """visits of a microbatch to each stage: 1 is GPipe (1811.06965), more the circular schedule (2104.04473)"""
    rules: tuple[tuple[str, ...], ...] = ()
    """lines in place of those of the table: a logical axis, then the mesh axes that it is split over, none for whole"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes out of range or not even, and lines that name no axis."""
        for name in AXES:
            if getattr(self, name) < (name != "data"):
                yield name, "must be at least 1" + (", or 0 for all devices left" if name == "data" else "")
        for name in ("slices", "microbatches", "rounds"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
        if self.slices > 1 and self.data % self.slices:
            yield "slices", f"does not divide data={self.data}, the only axis that is split over the slow network"
        if self.rounds > 1 and self.stage > 1 and self.microbatches % self.stage:
            yield "microbatches", f"must be a multiple of stage={self.stage}, so that rounds={self.rounds} fit together"
        for line in self.rules:
            logical = [name for name, _ in RULES]
            if not set(line[:1]) <= set(logical):
                yield "rules", f"names {line[0]}, which is no logical axis{did_you_mean(line[0], logical)}"
            for axis in line[1:]:
                if axis not in AXES:
                    yield "rules", f"names {axis}, which is no mesh axis{did_you_mean(axis, AXES)}"
            if len(set(line)) < len(line):
                yield "rules", f"names a mesh axis twice for {line[0]}"

    @property
    def table(self) -> Rules:
        """`RULES` with this mesh's own lines in it."""
        own: Rules = tuple((name, tuple(axes) or None) for name, *axes in filter(None, self.rules))
        return tuple(dict(RULES + own).items())

    def over(self, name: str) -> dict[str, int]:
        """The mesh axes that the logical axis `name` is split over, and their sizes; `data=0` counts as 1."""
        return {axis: max(getattr(self, axis), 1) for axis in group_of(dict(self.table)[name])}

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis where there are so many in all; raises InputError where they are too few."""
        sizes = {name: getattr(self, name) for name in AXES}
        sizes["data"] = sizes["data"] or max(devices // math.prod(list(sizes.values())[1:]), 1)
        if math.prod(sizes.values()) > devices:
            raise InputError(f"mesh {said(sizes)} needs {math.prod(sizes.values())} devices, there are {devices}")
        return sizes

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over the first devices (of each slice); raises InputError where there are too few."""
        devices = jax.devices() if devices is None else devices
        return Mesh(arranged(devices, tuple(self.sizes(len(devices)).values()), self.slices), AXES)

    def abstract(self) -> AbstractMesh:
        """The mesh without its devices, which need not be there: `data` is 1 where it would take those that are."""
        return AbstractMesh((max(self.data, 1), *(getattr(self, name) for name in AXES[1:])), AXES)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within, arrays are placed by this config's table, and stages work by its schedule: of all that is traced."""
        token = _IN_FORCE.set(self)
        try:
            yield
        finally:
            _IN_FORCE.reset(token)


_IN_FORCE: ContextVar[MeshConfig | None] = ContextVar("mesh in force", default=None)


def in_force() -> MeshConfig:
    """The config whose table and schedule count: the default one outside of `MeshConfig.in_force`."""
    return _IN_FORCE.get() or MeshConfig()


def said(sizes: Mapping[str, int]) -> str:
    """`data=2 x tensor=4`: the axes that split something."""
    return " x ".join(f"{name}={n}" for name, n in sizes.items() if n > 1)


def arranged(devices: Sequence[Any], sizes: tuple[int, ...], slices: int) -> np.ndarray:
    """Devices as an array of `sizes` whose first axis goes through one slice after the other.

    A device's slice is its `slice_index`, or its process where it has none. Raises InputError for too few slices.
    """
    groups: dict[int, list[Any]] = {}
    for device in devices:
        place = getattr(device, "slice_index", None) if slices > 1 else 0
        groups.setdefault(device.process_index if place is None else place, []).append(device)
    if sizes[0] % slices:
        raise InputError(f"mesh.slices={slices} does not divide mesh.data={sizes[0]}")
    each = math.prod(sizes) // slices
    full = [groups[place][:each] for place in sorted(groups) if len(groups[place]) >= each]
    if len(full) < slices:
        raise InputError(f"mesh.slices={slices} of {each} devices each: there are {len(full)} slices as large as that")
    return np.array(full[:slices], object).reshape(sizes)


def placed(names: Names) -> tuple[Any, ...]:
    """The mesh axis (or axes) of every axis of an array by the table in force, None where it has none."""
    spec = tuple(nn.logical_to_mesh_axes(names, in_force().table) or ())
    return spec + (None,) * (len(names) - len(spec))


def shardings(logical: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedSharding of every array of a tree, given the PartitionSpecs of its logical names and its shapes."""
    return jax.tree.map(
        lambda spec, x: NamedSharding(mesh, fit(placed(tuple(spec)), x.shape, mesh)),
        logical,
        shapes,
        is_leaf=is_spec,
    )


def is_spec(node: Any) -> bool:
    """Whether a node of a tree is the PartitionSpec of one array."""
    return isinstance(node, PartitionSpec)


def group_of(axes: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def fit(spec: Sequence[Any], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without the mesh axes that do not divide the array's axis, which `llmjax.parallel.fitting` reports."""
    kept = []
    for length, axes in zip(shape, spec, strict=False):
        parts = math.prod(mesh.shape[name] for name in group_of(axes))
        kept.append(axes if parts > 1 and length % parts == 0 else None)
    return PartitionSpec(*kept)


def per_device(
    function: Callable[..., Any], names: Sequence[Names], result: Names | tuple[Names, ...], *arrays: Array | None
) -> Any:
    """`function(*arrays)` on every device's own part, where the program is traced for a mesh of several devices.

    Kernels are compiled for one device, and GSPMD cannot split them. `names` are the logical names of each array's
    axes; None is an axis that every device sees whole, and so is one whose parts do not come out even in every array
    that has it; `result` are those of the output, or of each of several. `function` knows its own parts only, and
    must ask for others by the name of the mesh axis (as rings over `sequence_axis` do).
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Within a stage of a pipeline the mesh is split over stages already.
    free = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if math.prod(mesh.shape[axis] for axis in free) <= 1:
        return function(*arrays)
    given = [(name, x.shape) for name, x in zip(names, arrays, strict=True) if x is not None]
    several = any(isinstance(n, tuple) for n in result)
    results: Any = result if several else (result,)
    left = {n for name, shape in given for n, part in zip(name, fit(placed(name), shape, mesh)) if n and part is None}
    # Two axes of one array cannot be split over the same mesh axis: the second is whole, and so it is in all arrays.
    left |= {n for name in (*names, *results) for n, part in zip(name, placed(name)) if n and part is None}

    def spec(name: Names) -> PartitionSpec:
        return PartitionSpec(*placed(tuple(None if n in left else n for n in name)))

    out = tuple(map(spec, results)) if several else spec(results[0])
    split = jax.shard_map(function, in_specs=tuple(map(spec, names)), out_specs=out, axis_names=free, check_vma=False)
    return split(*arrays)


def sequence_axis() -> str | None:
    """The mesh axis that sequences are split over where the program is traced; None where each device has them whole.

    Within a stage they are whole, for XLA aborts there on a gather along a split axis, and where the table gives them
    several axes GSPMD does what there is to do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types:
        return None
    axes = [axis for axis in group_of(placed(("batch", "length"))[1]) if mesh.shape.get(axis, 1) > 1]
    return axes[0] if len(axes) == 1 else None


def summed_over_tokens(function: Callable[..., tuple[Array, Any]], shared: Any, *arrays: Array) -> tuple[Array, Any]:
    """`function(shared, *arrays)` -> (a sum over tokens, arrays `[batch, length]`), on every device's own tokens.

    `arrays` are `[batch, length, ...]`; of `shared` every device gets what the axes of tokens do not split. GSPMD
    splits the rest of what `function` does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return function(shared, *arrays)
    rows = fit(placed(("batch", "length")), arrays[0].shape[:2], mesh)
    over = {axis for axes in rows for axis in group_of(axes)}
    if not over:
        return function(shared, *arrays)

    def part(shared: Any, *arrays: Array) -> tuple[Array, Any]:
        total, each = function(shared, *arrays)
        return total[None], each

    split = jax.shard_map(
        part,
        in_specs=(PartitionSpec(), *(rows for _ in arrays)),
        out_specs=(PartitionSpec(tuple(axis for axis in AXES if axis in over)), rows),
        axis_names=over,
        check_vma=False,
    )
    total, each = split(shared, *arrays)
    return jnp.sum(total), each


def constrained(x: Array, names: Names) -> Array:
    """`x` with its axes split as the table says, None whole, where the program is traced for several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, fit(placed(names), x.shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch's arrays `[batch, length]`."""
    return NamedSharding(mesh, PartitionSpec(*placed(("batch", "length"))))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
