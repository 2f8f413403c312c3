"""The choice among the implementations of a function: the first that runs on the chip and refuses nothing."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pallas_kernels import chips

log = logging.getLogger("pallas_kernels")

HOPPER = ("H100", "H200", "H20", "GH200", "H800")
"""What the device kinds of chips with wgmma and TMA contain."""

FEW = 4
"""Tokens of a decoding step, at most: a scan of so few is one reading of its state, which XLA does best."""


class Backend(Protocol):
    """What is asked of an implementation here."""

    @property
    def runs_on(self) -> Callable[[str, str], bool]:
        """Whether it runs on (platform, device kind)."""


@dataclass(frozen=True)
class ModuleBackend:
    """An implementation that is a module of its own, the one of its name."""

    summary: str
    runs_on: Callable[[str, str], bool]
    """of (platform, device kind)"""


def choose(
    function: str,
    backends: Mapping[str, Backend],
    implementation: str | Sequence[str] | None,
    refusal: Callable[[str], str | None],
) -> str:
    """The name of the first implementation that can do it, of those asked for or, for None, of all `backends`.

    `refusal(name)` says why an implementation that runs here cannot do it. What None chose is logged once. Raises
    ValueError for an unknown name, NotImplementedError with all reasons where none can.
    """
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation or backends)
    for name in names:
        if name not in backends:
            raise ValueError(f"implementation={implementation!r} is unknown: use one of {', '.join(sorted(backends))}")
    platform, device = chips.target()
    reasons: list[str] = []
    for name in names:
        reason = refusal(name) if backends[name].runs_on(platform, device) else f"does not run on {device}"
        if reason is None:
            if implementation is None:
                announce(function, name, device, tuple(reasons))
            return name
        reasons.append(f'{function} "{name}" {reason}')
    raise NotImplementedError("; ".join(reasons))


def for_tokens(implementation: str | Sequence[str] | None, length: int) -> str | Sequence[str] | None:
    """What is asked of a scan over `length` tokens where the caller does not say: kernels only for more than `FEW`."""
    return "xla" if implementation is None and length <= FEW else implementation


@functools.cache
def announce(function: str, name: str, device: str, reasons: tuple[str, ...]) -> None:
    """Say once what was chosen on a device and why not another."""
    log.info('%s "%s" on %s%s', function, name, device, "".join(f"; {r}" for r in reasons))


def everywhere(platform: str, device: str) -> bool:
    """Plain XLA."""
    return True


def on_tpu(platform: str, device: str) -> bool:
    """Any TPU."""
    return platform == "tpu"


def on_hopper(platform: str, device: str) -> bool:
    """A chip with wgmma and TMA."""
    return platform == "gpu" and any(name in device for name in HOPPER)
