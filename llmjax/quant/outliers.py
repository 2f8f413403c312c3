"""Weights far out: what part of a layer's weights, or of a head's, lies beyond each threshold."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def outlier_fractions(
    w: Float[Array, "..."], thresholds: Sequence[float], keep: Sequence[int] = (), relative: bool = True
) -> Float[Array, "thresholds ..."]:
    """Part of |w| > threshold for each threshold, over all axes but `keep` (repeats, heads).

    Thresholds are in units of the weights' root mean square over the same axes, or absolute ones.
    """
    axes = tuple(axis for axis in range(w.ndim) if axis not in keep)
    unit = jnp.sqrt(jnp.mean(jnp.square(w), axis=axes, keepdims=True)) if relative else 1.0
    return jnp.stack([jnp.mean(jnp.abs(w) > threshold * unit, axis=axes) for threshold in thresholds])
