"""The implementations of the dequantising product: where each can run, in the order they are tried."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.dequantising_matmul.weights import Form, Weights
from pallas_kernels.dispatch import ModuleBackend, everywhere, on_tpu

BACKENDS = {
    "tpu": ModuleBackend("Pallas Mosaic for TPU, the matrix dequantised block by block in fast memory", on_tpu),
    "xla": ModuleBackend("plain XLA, the matrix dequantised as the compiler sees fit", everywhere),
    "reference": ModuleBackend("the definition, products in float32 or wider", everywhere),
}
"""In the order in which `implementation=None` tries them; each module has `refusal(x, weights, form)`, `product` and
`transposed_product`."""


def module_of(name: str) -> ModuleType:
    """An implementation's module, imported when it is first needed: Pallas takes long to import."""
    return importlib.import_module(f"pallas_kernels.dequantising_matmul.{name}")


def choose(implementation: str | Sequence[str] | None, x: Array, weights: Weights, form: Form) -> str:
    """The first implementation that can do it; raises ValueError or NotImplementedError with the reasons."""

    def refusal(name: str) -> str | None:
        return module_of(name).refusal(x, weights, form)

    return dispatch.choose("dequantising_matmul", BACKENDS, implementation, refusal)
