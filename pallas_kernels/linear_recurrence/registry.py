"""The implementations of the linear recurrence: where each can run, what it refuses, in the order they are tried."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from pallas_kernels import dispatch
from pallas_kernels.dispatch import ModuleBackend, everywhere

BACKENDS = {
    "xla": ModuleBackend("plain XLA, chunks side by side", everywhere),
    "reference": ModuleBackend("the definition, one token after the other", everywhere),
}
"""In the order in which `implementation=None` tries them; each module has `refusal(chunk)` and `recurrence`."""


def module_of(name: str) -> ModuleType:
    """An implementation's module."""
    return importlib.import_module(f"pallas_kernels.linear_recurrence.{name}")


def choose(implementation: str | Sequence[str] | None, chunk: int | None) -> ModuleType:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""

    def refusal(name: str) -> str | None:
        return module_of(name).refusal(chunk)

    return module_of(dispatch.choose("linear_recurrence", BACKENDS, implementation, refusal))
