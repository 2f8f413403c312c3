"""The implementations of the selective scan: where each can run, in the order they are tried."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from pallas_kernels import dispatch
from pallas_kernels.dispatch import ModuleBackend, everywhere, on_hopper, on_tpu
from pallas_kernels.selective_scan.inputs import Tokens, Weights

BACKENDS = {
    "tpu": ModuleBackend("Pallas Mosaic for TPU", on_tpu),
    "xla": ModuleBackend("plain XLA, the states of one chunk of tokens at a time", everywhere),
    "hopper": ModuleBackend("Pallas Mosaic GPU for sm_90a", on_hopper),
    "reference": ModuleBackend("the definition, one token after the other", everywhere),
}
"""In the order in which `implementation=None` tries them (the Hopper kernel, run by no chip yet, must be asked for);
each module has `refusal(tokens, weights)` and `scan`."""


def module_of(name: str) -> ModuleType:
    """An implementation's module."""
    return importlib.import_module(f"pallas_kernels.selective_scan.{name}")


def choose(implementation: str | Sequence[str] | None, tokens: Tokens, weights: Weights) -> ModuleType:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""

    def refusal(name: str) -> str | None:
        return module_of(name).refusal(tokens, weights)

    asked = dispatch.for_tokens(implementation, tokens.x.shape[1])
    return module_of(dispatch.choose("selective_scan", BACKENDS, asked, refusal))
