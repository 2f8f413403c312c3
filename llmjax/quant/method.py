"""What a post-training method is: one matrix and what its inputs look like in, a quantised tensor out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.quant.formats import Format, Scales, Zeros, into_blocks, out_of_blocks, per_weight
from llmjax.quant.tensor import Layout, QTensor, stored


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """What the inputs of a projection looked like on calibration data, float32; stacked like the parameter."""

    gram: Float[Array, "*stack inputs inputs"]
    """mean of x x^T over tokens"""
    mean: Float[Array, "*stack inputs"]
    """mean of |x|"""
    largest: Float[Array, "*stack inputs"]
    """largest |x|"""


@dataclass(frozen=True)
class Method(ABC):
    """Base of the methods."""

    def calibrated(self) -> bool:
        """Whether it needs statistics of the inputs."""
        return True

    @abstractmethod
    def quantise(
        self, w: Float[Array, "outputs inputs"], seen: Statistics | None, form: Format, layout: Layout
    ) -> QTensor:
        """The tensor that stands for a transposed float32 matrix."""


@dataclass(frozen=True)
class RTN(Method):
    """Round to nearest: each weight by itself, each block by its own scale."""

    def calibrated(self) -> bool:
        """No."""
        return False

    def quantise(
        self, w: Float[Array, "outputs inputs"], seen: Statistics | None, form: Format, layout: Layout
    ) -> QTensor:
        """Scales that clip nothing, nearest codes."""
        scales, zeros = form.fit(into_blocks(w, form.size(layout.rows, layout.columns)))
        return encoded(w, scales, zeros, form, layout)


def encoded(w: Float[Array, "outputs inputs"], scales: Scales, zeros: Zeros, form: Format, layout: Layout) -> QTensor:
    """The nearest codes of a transposed matrix by scales that are given."""
    blocks = into_blocks(w, form.size(layout.rows, layout.columns))
    codes = out_of_blocks(form.round(blocks, *per_weight(scales, zeros)), layout.rows, layout.columns)
    return stored(codes, scales, zeros, form, layout)


def output_loss(error: Float[Array, "outputs inputs"], gram: Float[Array, "inputs inputs"]) -> Float[Array, ""]:
    """Mean squared error of the outputs, tr(E G E^T), of a transposed matrix that is off by E."""
    return jnp.sum(jnp.matmul(error, gram, precision=jax.lax.Precision.HIGHEST) * error)
