"""Intrinsic dimension: training in a random subspace of all weights. Li et al. 2018; Aghajanyan et al. 2020."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Boxes, ProjectionAdapter, boxed
from llmjax.nn.model import Model
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class IntrinsicDimension(ProjectionAdapter):
    """theta = theta_0 + P z, one z `[dimension]` for all targets, P fixed and random (1804.08838; 2012.13255).

    Where z reaches a loss is how many directions the task needs; it is no matrix rank. P is made again from a key at
    each use: of independent normal entries, or Fastfood (Le et al. 2013), whose entries have the same variance.
    """

    dimension: int = 200
    """entries of z, all that trains"""
    projection: Literal["fastfood", "dense"] = "fastfood"
    """P: D log D operations and D numbers for D weights, or dimension times D of both"""

    def draw_shared(self, key: PRNGKeyArray, model: Model) -> Boxes:
        """z, zero."""
        return {"z": boxed(jnp.zeros(self.dimension), None)}

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """The words of the key that P is made from."""
        return {"key": boxed(jax.random.key_data(key), None)}

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """W, and its rows of P z."""
        form = fastfood if self.projection == "fastfood" else dense
        change = form(jax.random.wrap_key_data(params["key"]), shared["z"], kernel.size)
        return kernel + change.reshape(kernel.shape).astype(kernel.dtype)

    def trains(self, leaf: str) -> bool:
        """z alone."""
        return leaf == "z"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.dimension < 1:
            yield "dimension", "must be at least 1"


def dense(key: PRNGKeyArray, z: Float[Array, " dimension"], size: int) -> Float[Array, " size"]:
    """P z, entries of P normal with variance 1 / dimension."""
    return jax.random.normal(key, (size, len(z)), z.dtype) @ z / math.sqrt(len(z))


def fastfood(key: PRNGKeyArray, z: Float[Array, " dimension"], size: int) -> Float[Array, " size"]:
    """P z, P = H G pi H B / sqrt(n dimension) for blocks of n rows, n the power of two from `dimension` on.

    B random signs, pi a permutation, G normal, H the Hadamard matrix of entries +-1; a block of its own for each n rows
    that are wanted.
    """
    n = 1 << (len(z) - 1).bit_length()
    blocks = -(-size // n)
    padded = jnp.pad(z, (0, n - len(z)))

    def block(key: PRNGKeyArray) -> Float[Array, " n"]:
        keys = jax.random.split(key, 3)
        signs = jax.random.rademacher(keys[0], (n,), z.dtype)
        mixed = jax.random.permutation(keys[1], hadamard(signs * padded))
        return hadamard(jax.random.normal(keys[2], (n,), z.dtype) * mixed)

    return jax.lax.map(block, jax.random.split(key, blocks)).reshape(-1)[:size] / math.sqrt(n * len(z))


def hadamard(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """H x in n log n sums, H = [[1, 1], [1, -1]] kron ... kron [[1, 1], [1, -1]]."""
    n = len(x)
    for half in (1 << i for i in range(n.bit_length() - 1)):
        pairs = x.reshape(-1, 2, half)
        x = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(n)
    return x
