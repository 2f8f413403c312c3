"""The implementations of a hop: where each can run, what it refuses, in the order they are tried."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from pallas_kernels import dispatch
from pallas_kernels.attention.mask import Rule, Seen
from pallas_kernels.attention.vjp import Operands
from pallas_kernels.dispatch import everywhere, on_tpu


@dataclass(frozen=True)
class Backend:
    """One implementation; the module of its name has the functions of `xla`."""

    summary: str
    runs_on: Callable[[str, str], bool]
    """of (platform, device kind)"""


BACKENDS = {
    "tpu": Backend("Pallas Mosaic for TPU, the softmax carried through the kernel", on_tpu),
    "xla": Backend("plain XLA, tile by tile", everywhere),
}
"""In the order in which `implementation=None` tries them."""


def module_of(name: str) -> ModuleType:
    """An implementation's module, imported when it is first needed: Pallas takes longer to import than all the rest."""
    return importlib.import_module(f"pallas_kernels.ring_attention.{name}")


def choose(implementation: str | Sequence[str] | None, operands: Operands, seen: Seen, rule: Rule) -> ModuleType:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""
    query, key, value, _, sinks = operands

    def refusal(name: str) -> str | None:
        return module_of(name).refusal(query, key, value, rule, seen, sinks)

    return module_of(dispatch.choose("ring_attention", BACKENDS, implementation, refusal))
