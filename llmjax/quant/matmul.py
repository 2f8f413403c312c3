"""The product with a quantised matrix: dequantised where it is multiplied, forward and again backward.

    y = x S,   dL/dx = dL/dy S^T,   nothing to S

What the backward pass keeps is S as it is stored, never the dense matrix. Integers and codebooks of 4 or 8 bits whose
rows and blocks each lie in one output go to `pallas_kernels.dequantising_matmul`; other formats are expanded here.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, UInt8

from llmjax.quant.codebook import Codebook
from llmjax.quant.double import DoubleScales
from llmjax.quant.formats import Format, Zeros
from llmjax.quant.integers import Integer
from pallas_kernels.dequantising_matmul import dequantising_matmul


class Matrix(Protocol):
    """A pytree that holds the codes of a matrix, and can give the matrix."""

    @property
    def codes(self) -> UInt8[Array, "rows bytes"]:
        """As packed."""

    @property
    def scales(self) -> Float[Array, "rows blocks"] | DoubleScales:
        """Of the blocks."""

    @property
    def zeros(self) -> Zeros:
        """Zero points of the blocks."""

    @property
    def format(self) -> Format:
        """How codes are read."""

    def transposed(self) -> Float[Array, "outputs inputs"]:
        """S^T in float32."""


@jax.custom_vjp
def product(x: Float[Array, "... inputs"], matrix: Matrix) -> Float[Array, "... outputs"]:
    """x S in the dtype of x."""
    return multiplied(x, matrix, transpose=False)


def _forward(x: Float[Array, "... inputs"], matrix: Matrix) -> tuple[Float[Array, "... outputs"], Matrix]:
    return product(x, matrix), matrix


def _backward(matrix: Matrix, dy: Float[Array, "... outputs"]) -> tuple[Float[Array, "... inputs"], Any]:
    return multiplied(dy, matrix, transpose=True), jax.tree.map(_nothing, matrix)


def multiplied(x: Float[Array, "... contracted"], matrix: Matrix, transpose: bool) -> Float[Array, "... result"]:
    """x S, or x S^T."""
    shape = jax.eval_shape(matrix.transposed).shape
    if not in_rows(matrix, *shape):
        dense = matrix.transposed().astype(x.dtype)
        return jnp.matmul(x, dense if transpose else dense.T)
    scales = matrix.scales.values() if isinstance(matrix.scales, DoubleScales) else matrix.scales
    return dequantising_matmul(
        *(x, matrix.codes, scales, matrix.zeros),
        bits=matrix.format.width,
        codebook=matrix.format.levels if isinstance(matrix.format, Codebook) else None,
        transpose=transpose,
        implementation="xla" if divided() else None,
    )


def in_rows(matrix: Matrix, outputs: int, inputs: int) -> bool:
    """Whether each row of codes and of blocks is an output's, in a format that the kernels know."""
    form = matrix.format
    known = isinstance(form, Integer | Codebook) and form.width in (4, 8)
    whole = matrix.scales.shape[0] == outputs and inputs % matrix.scales.shape[-1] == 0
    return known and whole and matrix.codes.shape == (outputs, inputs * form.width // 8)


def divided() -> bool:
    """Whether the program is for a mesh of several devices, over which XLA divides what no kernel can."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in axes if kind != AxisType.Manual) > 1


def _nothing(leaf: Array) -> Array | np.ndarray:
    """The zero gradient of a leaf: of integers, jax's empty kind."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


product.defvjp(_forward, _backward)
