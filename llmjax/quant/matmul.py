"""The product with a quantised matrix: dequantised where it is multiplied, forward and again backward.

    y = x S,   dL/dx = dL/dy S^T,   nothing to S

What the backward pass keeps is S as it is stored, never the dense matrix.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Transposed(Protocol):
    """A pytree that can give a matrix."""

    def transposed(self) -> Float[Array, "outputs inputs"]:
        """S^T in float32."""


@jax.custom_vjp
def product(x: Float[Array, "... inputs"], matrix: Transposed) -> Float[Array, "... outputs"]:
    """x S in the dtype of x."""
    return jnp.einsum("...i,oi->...o", x, matrix.transposed().astype(x.dtype))


def _forward(x: Float[Array, "... inputs"], matrix: Transposed) -> tuple[Float[Array, "... outputs"], Transposed]:
    return product(x, matrix), matrix


def _backward(matrix: Transposed, dy: Float[Array, "... outputs"]) -> tuple[Float[Array, "... inputs"], Any]:
    dx = jnp.einsum("...o,oi->...i", dy, matrix.transposed().astype(dy.dtype))
    return dx, jax.tree.map(_nothing, matrix)


def _nothing(leaf: Array) -> Array | np.ndarray:
    """The zero gradient of a leaf: of integers, jax's empty kind."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


product.defvjp(_forward, _backward)
