"""The implementations of decode attention: where each can run, what it refuses, and in which order they are tried."""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from jaxtyping import Array

from pallas_kernels.attention.registry import everywhere, on_hopper
from pallas_kernels.chips import target
from pallas_kernels.decode_attention.cache import Cache, Config

log = logging.getLogger("pallas_kernels")


@dataclass(frozen=True)
class Backend:
    """One implementation; the module of its name has `refusal(query, cache, config)` and `partials`."""

    summary: str
    runs_on: Callable[[str, str], bool]
    """of (platform, device kind)"""


BACKENDS = {
    "tpu": Backend("Pallas Mosaic for TPU", lambda platform, device: platform == "tpu"),
    "xla": Backend("plain XLA, a loop over blocks of keys", everywhere),
    "hopper": Backend("Pallas Mosaic GPU for sm_90a", on_hopper),
    "reference": Backend("the definition, float32 or float64", everywhere),
}
"""In the order in which `implementation=None` tries them: the Hopper kernel, run by no chip yet, must be asked for."""


@functools.cache
def module_of(name: str) -> ModuleType:
    """An implementation's module, imported when it is first needed: Pallas takes longer to import than all the rest."""
    return importlib.import_module(f"pallas_kernels.decode_attention.{name}")


def choose(implementation: str | tuple[str, ...] | None, query: Array, cache: Cache, config: Config) -> ModuleType:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""
    names = (implementation,) if isinstance(implementation, str) else implementation or tuple(BACKENDS)
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"implementation={implementation!r} is unknown: use one of {', '.join(sorted(BACKENDS))}")
    platform, device = target()
    reasons: list[str] = []
    for name in names:
        fits = BACKENDS[name].runs_on(platform, device)
        reason = module_of(name).refusal(query, cache, config) if fits else f"does not run on {device}"
        if reason is None:
            if implementation is None:
                announce(name, device, tuple(reasons))
            return module_of(name)
        reasons.append(f'decode_attention "{name}" {reason}')
    raise NotImplementedError("; ".join(reasons))


@functools.cache
def announce(name: str, device: str, reasons: tuple[str, ...]) -> None:
    """Say once what was chosen on a device and why not another."""
    log.info('decode_attention "%s" on %s%s', name, device, "".join(f"; {r}" for r in reasons))
