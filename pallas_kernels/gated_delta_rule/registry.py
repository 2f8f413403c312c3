"""The implementations of the gated delta rule: where each can run, and in which order they are tried."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from pallas_kernels import dispatch
from pallas_kernels.dispatch import everywhere
from pallas_kernels.gated_linear_attention.call import Call


@dataclass(frozen=True)
class Backend:
    """One implementation; the module of its name has `refusal(call)` and `run(call, beta)`."""

    summary: str
    runs_on: Callable[[str, str], bool]
    """of (platform, device kind)"""


BACKENDS = {
    "xla": Backend("plain XLA, products within chunks and a loop over chunks", everywhere),
    "reference": Backend("the recurrence, token by token", everywhere),
}
"""In the order in which `implementation=None` tries them."""


@functools.cache
def module_of(name: str) -> ModuleType:
    """An implementation's module, imported when it is first needed."""
    return importlib.import_module(f"pallas_kernels.gated_delta_rule.{name}")


def choose(implementation: str | tuple[str, ...] | None, call: Call) -> ModuleType:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""

    def refusal(name: str) -> str | None:
        return module_of(name).refusal(call)

    return module_of(dispatch.choose("gated_delta_rule", BACKENDS, implementation, refusal))
