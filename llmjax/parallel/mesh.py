"""The device mesh and the table from logical axis names to mesh axes.

Parameters carry logical names (`nn.with_logical_partitioning`); GSPMD (Xu et al. 2021, 2105.04663) does the rest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from llmjax.config import InputError

Names = tuple[str | None, ...]

AXES = ("data", "fsdp", "stage", "context", "expert", "tensor")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
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

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes out of range."""
        for name in AXES:
            if getattr(self, name) < (name != "data"):
                yield name, "must be at least 1" + (", or 0 for all devices left" if name == "data" else "")

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over the first devices; raises InputError where there are too few."""
        devices = jax.devices() if devices is None else devices
        sizes = [getattr(self, name) for name in AXES]
        others = math.prod(sizes[1:])
        sizes[0] = sizes[0] or max(len(devices) // others, 1)
        count = math.prod(sizes)
        if count > len(devices):
            wanted = " x ".join(f"{name}={n}" for name, n in zip(AXES, sizes, strict=True) if n > 1)
            raise InputError(f"mesh {wanted} needs {count} devices, there are {len(devices)}")
        return Mesh(np.asarray(devices[:count]).reshape(sizes), AXES)


def shardings(logical: Any, shapes: Any, mesh: Mesh) -> Any:
    """NamedSharding of every array of a tree, given the PartitionSpecs of its logical names and its shapes."""
    return jax.tree.map(
        lambda spec, x: NamedSharding(mesh, fit(nn.logical_to_mesh_axes(tuple(spec), RULES), x.shape, mesh)),
        logical,
        shapes,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def fit(spec: PartitionSpec | None, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without the mesh axes that do not divide the array's axis: such an axis is left whole."""
    kept = []
    for length, names in zip(shape, tuple(spec or ()), strict=False):
        group = names if isinstance(names, tuple) else (names,) if names else ()
        parts = math.prod(mesh.shape[name] for name in group)
        kept.append(names if parts > 1 and length % parts == 0 else None)
    return PartitionSpec(*kept)


def per_device(
    function: Callable[..., Any], names: Sequence[Names], result: Names | tuple[Names, ...], *arrays: Array | None
) -> Any:
    """`function(*arrays)` on every device's own part, where the program is traced for a mesh of several devices.

    Kernels are compiled for one device, and GSPMD cannot split them. `names` are the logical names of each array's
    axes; None is an axis that every device sees whole, and so is one whose parts do not come out even in every array
    that has it; `result` are those of the output, or of each of several. What `function` computes along a split axis
    must not depend on the other parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return function(*arrays)
    given = [(name, x) for name, x in zip(names, arrays, strict=True) if x is not None]
    whole = {n for name, x in given for n, part in zip(name, _spec(name, x.shape, mesh)) if n and part is None}

    def spec(name: Any) -> Any:
        if any(isinstance(n, tuple) for n in name):
            return tuple(spec(n) for n in name)
        return nn.logical_to_mesh_axes(tuple(None if n in whole else n for n in name), RULES) or PartitionSpec()

    specs, out = tuple(spec(name) for name in names), spec(result)
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


def _spec(names: Names, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[Any, ...]:
    """The mesh axes of every axis of an array, None where there are none or where they do not divide it."""
    spec = tuple(fit(nn.logical_to_mesh_axes(names, RULES), shape, mesh))
    return spec + (None,) * (len(shape) - len(spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch's arrays `[batch, length]`."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch", "length"), RULES) or PartitionSpec())


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
