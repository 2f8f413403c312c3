"""Rounding in rotated coordinates: x W = (x R)(R W) with the Hadamard rotation R of `llmjax.quant.hadamard`."""

from dataclasses import dataclass, field, replace

from jaxtyping import Array, Float

from llmjax.quant.formats import Format
from llmjax.quant.gptq import GPTQ
from llmjax.quant.hadamard import rotate
from llmjax.quant.method import RTN, Method, Statistics
from llmjax.quant.tensor import Layout, QTensor


@dataclass(frozen=True)
class Rotated(Method):
    """Rotate inputs and weights, then another method. Ashkboos et al. 2024 (2404.00456)."""

    method: RTN | GPTQ = field(default_factory=RTN)
    """what rounds the rotated weights"""

    def calibrated(self) -> bool:
        """As the method it hands on to."""
        return self.method.calibrated()

    def quantise(
        self, w: Float[Array, "outputs inputs"], seen: Statistics | None, form: Format, layout: Layout
    ) -> QTensor:
        """The matrix R W."""
        if seen is not None:
            seen = replace(seen, gram=rotate(rotate(seen.gram).T))
        return replace(self.method.quantise(rotate(w), seen, form, layout), rotated=True)
