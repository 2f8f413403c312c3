"""The implementations of decode attention: where each can run, what it refuses, and in which order they are tried."""

import functools
import importlib
from types import ModuleType

from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.decode_attention.cache import Cache, Config
from pallas_kernels.dispatch import ModuleBackend, everywhere, on_hopper, on_tpu

BACKENDS = {
    "tpu": ModuleBackend("Pallas Mosaic for TPU", on_tpu),
    "xla": ModuleBackend("plain XLA, a loop over blocks of keys", everywhere),
    "hopper": ModuleBackend("Pallas Mosaic GPU for sm_90a", on_hopper),
    "reference": ModuleBackend("the definition, float32 or float64", everywhere),
}
"""In the order in which `implementation=None` tries them: the Hopper kernel, run by no chip yet, must be asked for.
Each module has `refusal(query, cache, config)` and `partials`."""


@functools.cache
def module_of(name: str) -> ModuleType:
    """An implementation's module, imported when it is first needed: Pallas takes longer to import than all the rest."""
    return importlib.import_module(f"pallas_kernels.decode_attention.{name}")


def choose(implementation: str | tuple[str, ...] | None, query: Array, cache: Cache, config: Config) -> ModuleType:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""

    def refusal(name: str) -> str | None:
        return module_of(name).refusal(query, cache, config)

    return module_of(dispatch.choose("decode_attention", BACKENDS, implementation, refusal))
