"""Ranks that are no integers: of matrices, from their singular values `[..., values]`, the largest first."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmjax.nn.model import Model
from llmjax.nn.projections import Projection, projections


def matrices(model: Model, changes: Mapping[str, Any]) -> dict[str, Float[Array, "*stack inputs outputs"]]:
    """Kernels, or changes of them (`merge`), by path, as matrices: the axes of inputs, and of outputs, made one."""
    kernels = {f"{path}/{p.leaf}": p for path, p in projections(model).items()}
    return {path: matrix(x, kernels[path]) for path, x in changes.items() if path in kernels}


def matrix(kernel: Float[Array, "..."], projection: Projection) -> Float[Array, "*stack inputs outputs"]:
    """A kernel, stacked over layers and experts or not, as matrices."""
    stack = kernel.shape[: kernel.ndim - len(projection.axes)]
    return kernel.reshape(*stack, math.prod(projection.inputs), math.prod(projection.outputs))


def singular_values(matrix: Float[Array, "*stack inputs outputs"]) -> Float[Array, "*stack values"]:
    """Singular values, float32."""
    return jnp.linalg.svd(matrix.astype(jnp.float32), compute_uv=False)


def numerical_rank(values: Float[Array, "*stack values"], tolerance: float = 1e-5) -> Int[Array, "*stack"]:
    """How many are above `tolerance` times the largest."""
    return jnp.sum(values > tolerance * values[..., :1], axis=-1)


def entropy_rank(values: Float[Array, "*stack values"]) -> Float[Array, "*stack"]:
    """exp of the entropy of s / sum s: n of an identity, 1 of rank one (Roy and Vetterli 2007); 0 of zeros."""
    share = values / jnp.maximum(jnp.sum(values, axis=-1, keepdims=True), jnp.finfo(values.dtype).tiny)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), axis=-1)
    return jnp.where(values[..., 0] > 0, jnp.exp(entropy), 0)


def stable_rank(values: Float[Array, "*stack values"]) -> Float[Array, "*stack"]:
    """|W|_F^2 / |W|_2^2, at most the rank; 0 of zeros."""
    share = values / jnp.maximum(values[..., :1], jnp.finfo(values.dtype).tiny)
    return jnp.sum(jnp.square(share), axis=-1)


def energy(values: Float[Array, "*stack values"]) -> Float[Array, "*stack values"]:
    """The part of |W|_F^2 that the first 1, 2, ... directions hold; 1 of zeros."""
    total = jnp.cumsum(jnp.square(values), axis=-1)
    return jnp.where(total[..., -1:] > 0, total / jnp.maximum(total[..., -1:], jnp.finfo(values.dtype).tiny), 1)
