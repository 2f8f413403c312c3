"""Accelerators by name: the facts that kernels and reports need, and devices that are not there.

Devices that are not there let the real TPU and GPU compilers work on a machine that has neither. TPU needs `libtpu`,
and TPU_SKIP_MDS_QUERY=1, TPU_WORKER_HOSTNAMES=localhost in the environment; GPU needs the CUDA plugin and PJRT packages
of the same jax. JAX_PLATFORMS=cpu keeps both from being started.
"""

from dataclasses import dataclass
from importlib import resources

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Chip:
    """One device as jax sees it: its name here, its `device_kind` strings, and its rates."""

    name: str
    kinds: tuple[str, ...]
    """How `jax.Device.device_kind` begins; the longest match over all chips wins."""
    flops: float
    """Dense bfloat16 peak of one jax device, FLOP/s (the makers' data sheets)."""
    flops_per_cycle: int | None = None
    """Dense bfloat16 peak in one cycle of the TPU compiler's estimates; None where they do not tell it."""


CHIPS = (
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), flops=197e12, flops_per_cycle=4 * 2 * 128**2),
    Chip("v5p", ("TPU v5",), flops=459e12, flops_per_cycle=8 * 2 * 128**2),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), flops=918e12, flops_per_cycle=4 * 2 * 256**2),
    Chip("tpu7x", ("TPU7x", "TPU v7x"), flops=1153e12),
    # The H100 has the same processors and tensor peak as the H200 and less bandwidth: it takes the H200's configs.
    Chip("h200", ("NVIDIA H200", "NVIDIA H100"), flops=989e12),
)


def target() -> tuple[str, str]:
    """(platform, device kind) of the program that is being traced: the abstract device's, else the first device's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.platform, device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, or None where it is none of `CHIPS` (a CPU, another GPU)."""
    found = [(len(kind), chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda match: match[0])[1] if found else None


def absent_devices(target: str) -> list[jax.Device]:
    """Devices of `chip:topology`, such as "v5e:4x4" or "h200:1x1x8" (hosts x ... x GPUs a host).

    Raises ValueError where the name has another form, RuntimeError where no compiler for it is installed.
    """
    chip, colon, shape = target.partition(":")
    if not colon or not shape.replace("x", "").isdecimal():
        raise ValueError(f"topology={target!r} is not of the form chip:AxBxC, such as v5e:4x4 or h200:1x1x8")
    description = resources.files("pallas_kernels.chips").joinpath(f"{chip}.txtpb")
    if description.is_file():
        text = description.read_text()
        found = topologies.get_topology_desc(platform="cuda", target_config=text, topology=shape)
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return list(found.devices)
