"""How much two changes of one matrix get in each other's way; matrices are `[..., inputs, outputs]`."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def cosine(
    one: Float[Array, "*stack inputs outputs"], two: Float[Array, "*stack inputs outputs"]
) -> Float[Array, "*stack"]:
    """<D1, D2> / (|D1| |D2|), Frobenius: 1 of the same, 0 where they share no direction."""
    return jnp.sum(one * two, axis=(-2, -1)) / (norm(one) * norm(two))


def overlap(
    one: Float[Array, "*stack inputs outputs"], two: Float[Array, "*stack inputs outputs"]
) -> Float[Array, "*stack"]:
    """|D1 D2^T| / (|D1| |D2|), Frobenius: 0 where what they write spans disjoint subspaces, about 1/sqrt(outputs) at
    random whatever the ranks, 1 where both write one direction.
    """
    return norm(one @ two.mT) / (norm(one) * norm(two))


def against_chance(
    one: Float[Array, "*stack inputs outputs"], two: Float[Array, "*stack inputs outputs"]
) -> Float[Array, "*stack"]:
    """`overlap` as a multiple of what random changes have, 1/sqrt(outputs)."""
    return math.sqrt(one.shape[-1]) * overlap(one, two)


def norm(matrix: Float[Array, "*stack inputs outputs"]) -> Float[Array, "*stack"]:
    """The Frobenius norm; of zeros the smallest number above them, so that they interfere with nothing."""
    return jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(-2, -1))), jnp.finfo(matrix.dtype).tiny)
