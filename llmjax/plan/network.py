"""How fast a chip sends within a group: rings over the dimensions of a torus, or NVLink and network cards."""

from collections.abc import Sequence
from typing import Any

from llmjax.plan.chips import LINK_EFFICIENCY, Chip

Place = tuple[int, ...]
"""Coordinates in the torus (TPU), or (host, GPU of the host)."""


def place_of(device: Any, chip: Chip, shape: Sequence[int]) -> Place:
    """Where a device of the topology `shape` is."""
    if chip.platform == "tpu":
        return tuple(device.coords)
    return divmod(device.id, shape[-1])


def rate(chip: Chip, shape: Sequence[int], places: Sequence[Place]) -> float:
    """Bytes a second that each chip of the group sends in a collective that uses all its links at once.

    TPU: along each dimension that the group spans two links where the dimension is closed to a ring, one where it is a
    line (its ends then hold up the others). GPU: the NVLinks within a host; across hosts the cards of all GPUs of the
    group in a host, since each byte crosses once and then spreads by NVLink.
    """
    if chip.platform == "gpu":
        hosts = {host for host, _ in places}
        cards = len(places) / len(hosts) * chip.host_bandwidth
        return LINK_EFFICIENCY * (chip.link_bandwidth if len(hosts) == 1 else min(chip.link_bandwidth, cards))
    links = 0
    for axis, coordinates in enumerate(zip(*places)):
        span = len(set(coordinates))
        links += 0 if span == 1 else 2 if span == shape[axis] and closed(chip, shape, axis) else 1
    return LINK_EFFICIENCY * links * chip.link_bandwidth if links else chip.hbm_bandwidth


def closed(chip: Chip, shape: Sequence[int], axis: int) -> bool:
    """Whether a dimension of the slice is a ring: in whole cubes of v4, v5p and tpu7x, in full rows of v5e and v6e."""
    if chip.wraps == 4:
        return len(shape) == 3 and all(size % 4 == 0 for size in shape)
    return shape[axis] == chip.wraps
