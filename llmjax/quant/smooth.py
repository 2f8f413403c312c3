"""SmoothQuant: the outliers of activations are moved into the weights, where they round well.

    x W = (x / s)(s W),   s_i = max|x_i|^alpha / max_o |W_io|^(1 - alpha)

Xiao et al. 2022 (2211.10438). It pays where activations are rounded too. The division is exact before rounding, and can
be folded into the norm or projection before the layer when all that read it share s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.quant.formats import Format
from llmjax.quant.gptq import GPTQ
from llmjax.quant.method import RTN, Method, Statistics
from llmjax.quant.rotation import Rotated
from llmjax.quant.tensor import Layout, QTensor


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Scaling that shares the range of activations with the weights, then another method."""

    alpha: float = 0.5
    """how much of the activations' range the weights take over, 0 to 1"""
    method: RTN | GPTQ | Rotated = field(default_factory=RTN)
    """what rounds the scaled weights"""

    def quantise(
        self, w: Float[Array, "outputs inputs"], seen: Statistics | None, form: Format, layout: Layout
    ) -> QTensor:
        """The matrix s W, with the gain 1 / s."""
        assert seen is not None
        s = smoothing(seen.largest, jnp.max(jnp.abs(w), axis=0), self.alpha)
        scaled = Statistics(seen.gram / jnp.outer(s, s), seen.mean / s, seen.largest / s)
        return replace(self.method.quantise(w * s, scaled, form, layout), gain=1 / s)

    def problems(self) -> Iterator[tuple[str, str]]:
        """A share out of range."""
        if not 0 <= self.alpha <= 1:
            yield "alpha", "must be 0 to 1"


def smoothing(
    activations: Float[Array, " inputs"], weights: Float[Array, " inputs"], alpha: float
) -> Float[Array, " inputs"]:
    """s from the largest magnitudes of each input's activations and weights; 1 where either is always zero."""
    s = activations**alpha / jnp.where(weights > 0, weights, 1.0) ** (1 - alpha)
    return jnp.where((activations > 0) & (weights > 0), s, 1.0)


def fold(
    s: Float[Array, " inputs"], before: Sequence[Float[Array, "... inputs"]], kernels: Sequence[Float[Array, "..."]]
) -> tuple[list[Float[Array, "... inputs"]], list[Float[Array, "..."]]]:
    """`before` (a norm's scale and bias, or a kernel's last axis) over s, and the kernels that read it times s."""
    return (
        [array / s for array in before],
        [kernel * s.reshape(-1, *(1,) * (kernel.ndim - 1)) for kernel in kernels],
    )
