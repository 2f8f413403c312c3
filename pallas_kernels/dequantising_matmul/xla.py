"""Plain XLA: the matrix is dequantised where it is multiplied, which the compiler may fuse and partitions by itself."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequantising_matmul.weights import Form, Weights, transposed


def refusal(x: Array, weights: Weights, form: Form) -> str | None:
    """It takes everything."""
    return None


def product(x: Float[Array, "rows inputs"], weights: Weights, form: Form) -> Float[Array, "rows outputs"]:
    """x W, W rounded to the dtype of x."""
    return jnp.einsum("mk,nk->mn", x, transposed(weights, form).astype(x.dtype))


def transposed_product(x: Float[Array, "rows outputs"], weights: Weights, form: Form) -> Float[Array, "rows inputs"]:
    """x W^T, W rounded to the dtype of x."""
    return jnp.einsum("mn,nk->mk", x, transposed(weights, form).astype(x.dtype))
