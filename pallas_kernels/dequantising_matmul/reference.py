"""The definition: the dense matrix in float32, products in float32 or wider."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequantising_matmul.weights import Form, Weights, transposed


def refusal(x: Array, weights: Weights, form: Form) -> str | None:
    """It takes everything."""
    return None


def product(x: Float[Array, "rows inputs"], weights: Weights, form: Form) -> Float[Array, "rows outputs"]:
    """x W."""
    return exact(x, transposed(weights, form).T)


def transposed_product(x: Float[Array, "rows outputs"], weights: Weights, form: Form) -> Float[Array, "rows inputs"]:
    """x W^T."""
    return exact(x, transposed(weights, form))


def exact(left: Float[Array, "m k"], right: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Their product with nothing rounded below float32 but the result."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    found = jnp.matmul(left.astype(wide), right.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return found.astype(left.dtype)
