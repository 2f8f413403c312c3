"""What must be ordered for a target: hosts, chips a host, and the names that Google Cloud gives them.

Facts: Cloud TPU's pages on v4, v5e, v5p, v6e and software versions, GKE's page on planning TPUs (machine types, node
labels, which topologies there are). The Cloud TPU API, which has queued resources, ends with v6e; TPU7x is GKE's only.
"""

import math
from dataclasses import dataclass

from llmjax.config import ConfigError, InputError
from llmjax.parallel.mesh import AXES, MeshConfig, said
from llmjax.plan.target import CUBES, FLAT, Target, read, unknown_topology


@dataclass(frozen=True)
class Family:
    """What one generation of TPUs is called, and how it comes."""

    accelerator: str
    """Accelerator types begin with it, such as v5litepod-16."""
    counted: int
    """What their number counts of each chip: its TensorCores, or 1 for the chip."""
    label: str
    """Value of GKE's node label cloud.google.com/gke-tpu-accelerator."""
    machine: str
    """GKE's machine types begin with it, and end with the number of chips and a t."""
    runtime: str | None
    """Cloud TPU's software version for JAX; None where the API does not offer the chip."""
    largest: int
    """Chips of the largest slice."""
    devices: int = 1
    """Devices that jax sees in a chip."""


FAMILIES = {
    "v4": Family("v4", 2, "tpu-v4-podslice", "ct4p-hightpu", "tpu-ubuntu2204-base", 4096),
    "v5e": Family("v5litepod", 1, "tpu-v5-lite-podslice", "ct5lp-hightpu", "v2-alpha-tpuv5-lite", 256),
    "v5p": Family("v5p", 2, "tpu-v5p-slice", "ct5p-hightpu", "v2-alpha-tpuv5", 6144),
    "v6e": Family("v6e", 1, "tpu-v6e-slice", "ct6e-standard", "v2-alpha-tpuv6e", 256),
    "tpu7x": Family("tpu7x", 2, "tpu7x", "tpu7x-standard", None, 9216, devices=2),
}


@dataclass(frozen=True)
class Machines:
    """The machines of a target: one TPU slice, or GPU nodes."""

    target: Target
    hosts: int
    chips_per_host: int
    family: Family | None
    """None for GPUs and for the CPU."""

    @property
    def devices(self) -> int:
        """Devices that jax sees in all of them."""
        return self.target.chips * (self.family.devices if self.family else 1)

    @property
    def topology(self) -> str:
        """The shape of a TPU slice, as 4x4x4."""
        return self.target.text.partition(":")[2]

    def __str__(self) -> str:
        hosts = f"{self.hosts} host{'s' if self.hosts > 1 else ''}"
        return f"{self.target.text}: {self.target.chips} chips on {hosts} of {self.chips_per_host}"


def machines(text: str) -> Machines:
    """The machines of a target in `llmjax plan`'s notation, for which no compiler is needed here.

    Raises InputError for an unknown chip or slice, with the nearest that there are.
    """
    target, (name, _, sizes) = read(text), text.partition(":")
    if target.chip is None:
        if target.shape != (1,):
            raise InputError(f"target={text!r}: a run sees the CPU as one device: use cpu:1")
        return Machines(target, 1, 1, None)
    if target.chip.platform == "gpu":
        if len(target.shape) != 3 or target.shape[1] != 1:
            raise unknown_topology(target)
        return Machines(target, target.shape[0], target.shape[2], None)
    if not offered(target, sizes):
        raise unknown_topology(target)
    each = target.chips if target.chips in (1, 8) and sizes in FLAT else 4
    return Machines(target, target.chips // each, each, FAMILIES[name])


def offered(target: Target, sizes: str) -> bool:
    """Whether there are TPU slices of this shape: up to 64 chips those listed, above them cubes of 4x4x4 in a row."""
    family = FAMILIES[target.text.partition(":")[0]]
    if target.chip is not None and target.chip.wraps == 16:
        return sizes in FLAT
    cubes = len(target.shape) == 3 and all(side % 4 == 0 for side in target.shape)
    return sizes in CUBES[:4] or (cubes and [*target.shape] == sorted(target.shape) and target.chips <= family.largest)


def accelerator(found: Machines, family: Family) -> list[str]:
    """gcloud's flags for a slice: its accelerator type, or type and topology where that type has another shape.

    Of the slices with one number of chips, the accelerator type stands for the most compact.
    """
    rivals = [shape for shape in CUBES if math.prod(map(int, shape.split("x"))) == found.target.chips]
    usual = min(rivals, key=lambda shape: max(map(int, shape.split("x"))), default=None)
    if found.topology in (*FLAT, usual):
        return [f"--accelerator-type={family.accelerator}-{found.target.chips * family.counted}"]
    return [f"--type={family.accelerator}", f"--topology={found.topology}"]


def check_mesh(mesh: MeshConfig, devices: int, where: str) -> None:
    """Raise ConfigError where the mesh has not as many devices as `where` has, with the axis that would be right."""
    sizes = {axis: max(getattr(mesh, axis), 1) for axis in AXES}
    product = math.prod(sizes.values())
    if product == devices or (not mesh.data and devices % product == 0):
        return
    right = {axis: devices * n // product for axis, n in sizes.items() if devices * n % product == 0}
    split = [axis for axis in AXES if sizes[axis] > 1 and axis in right] or [*right]
    wrong = split[0] if split else next(axis for axis in AXES if sizes[axis] > 1)
    use = f"mesh.{wrong}={right[wrong]}" if split else f"axes whose product is {devices}"
    value = getattr(mesh, wrong)
    raise ConfigError(
        f"mesh.{wrong}={value} makes a mesh of {product} devices ({said(sizes) or 'no axis is split'}), "
        f"but {where} has {devices}: use {use}"
    )
