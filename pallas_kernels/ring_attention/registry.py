"""The implementations of a hop: where each can run, what it refuses, in the order they are tried."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from pallas_kernels import dispatch
from pallas_kernels.attention.mask import Rule, Seen
from pallas_kernels.attention.vjp import Operands
from pallas_kernels.dispatch import ModuleBackend, everywhere, on_tpu

BACKENDS = {
    "tpu": ModuleBackend("Pallas Mosaic for TPU, the softmax carried through the kernel", on_tpu),
    "xla": ModuleBackend("plain XLA, tile by tile", everywhere),
}
"""In the order in which `implementation=None` tries them; each module has the functions of `xla`."""


def module_of(name: str) -> ModuleType:
    """An implementation's module, imported when it is first needed: Pallas takes longer to import than all the rest."""
    return importlib.import_module(f"pallas_kernels.ring_attention.{name}")


def choose(implementation: str | Sequence[str] | None, operands: Operands, seen: Seen, rule: Rule) -> ModuleType:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""
    query, key, value, _, sinks = operands

    def refusal(name: str) -> str | None:
        return module_of(name).refusal(query, key, value, rule, seen, sinks)

    return module_of(dispatch.choose("ring_attention", BACKENDS, implementation, refusal))
