"""The implementations of the gated delta rule: where each can run, and in which order they are tried."""

import functools
import importlib
from types import ModuleType

from pallas_kernels import dispatch
from pallas_kernels.dispatch import ModuleBackend, everywhere, on_tpu
from pallas_kernels.gated_linear_attention.call import Call

BACKENDS = {
    "tpu": ModuleBackend("Pallas Mosaic for TPU, chunks in products, the state in vector memory", on_tpu),
    "xla": ModuleBackend("plain XLA, products within chunks and a loop over chunks", everywhere),
    "reference": ModuleBackend("the recurrence, token by token", everywhere),
}
"""In the order in which `implementation=None` tries them; each module has `refusal(call)` and `run(call, beta)`."""


@functools.cache
def module_of(name: str) -> ModuleType:
    """An implementation's module, imported when it is first needed."""
    return importlib.import_module(f"pallas_kernels.gated_delta_rule.{name}")


def choose(implementation: str | tuple[str, ...] | None, call: Call) -> ModuleType:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""

    def refusal(name: str) -> str | None:
        return module_of(name).refusal(call)

    asked = dispatch.for_tokens(implementation, call.value.shape[1])
    return module_of(dispatch.choose("gated_delta_rule", BACKENDS, asked, refusal))
