"""Hadamard rotation: x W = (x R)(R^T W), R orthonormal, spreads outliers of inputs and weights over all channels.

R is block-diagonal, of Sylvester matrices H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt 2 of the largest power of two that
divides the number of inputs; it is its own transpose and inverse. Ashkboos et al. 2024 (QuaRot, 2404.00456).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(x: Float[Array, "... features"]) -> Float[Array, "... features"]:
    """x R over the last axis, in n log n additions."""
    features = x.shape[-1]
    size = features & -features
    y = x.reshape(*x.shape[:-1], features // size, size)
    for level in range(size.bit_length() - 1):
        pairs = y.reshape(*y.shape[:-1], -1, 2, 2**level)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([first + second, first - second], axis=-2).reshape(y.shape)
    return (y / math.sqrt(size)).astype(x.dtype).reshape(x.shape)
