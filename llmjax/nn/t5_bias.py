"""T5's relative position bias: one learned number a head for each bucket of distances, buckets wider with distance."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmjax.nn.distance import DistanceBias
from llmjax.nn.initializers import Init
from llmjax.nn.linear import parameter


@dataclass(frozen=True)
class T5Bias(DistanceBias):
    """table[h, bucket(j - i)]. Raffel et al. 2019 (1910.10683), section 2.1 and their code."""

    buckets: int = 32
    """buckets of all distances (T5: 32); half of them for keys ahead where attention is not causal"""
    max_distance: int = 128
    """tokens from which on all distances share the last bucket (T5: 128)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Buckets that cannot be divided; a logarithm without room."""
        if self.buckets < 4 or self.buckets % 2:
            yield "buckets", "must be an even number, at least 4: two directions, near and far"
        elif self.max_distance <= self.buckets // 2:
            yield "max_distance", f"must exceed the {self.buckets // 2} distances that have a bucket each"

    def build(self, heads: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return T5BiasModule(self, heads, init, name=name)

    def scores(
        self,
        table: Float[Array, "heads buckets"],
        query_positions: Int[Array, "batch length"],
        key_positions: Int[Array, "batch source"],
        causal: bool,
    ) -> Float[Array, "batch heads length source"]:
        """The table's entry for every pair; where causal, keys ahead count as distance 0."""
        far = self.max_distance
        ahead = jnp.clip(key_positions[:, None, :] - query_positions[:, :, None], -far, far)
        by_distance = table.astype(jnp.float32)[:, buckets_ahead(self.buckets, far, causal)]
        return jnp.moveaxis(by_distance[:, ahead + far], 0, 1)


class T5BiasModule(nn.Module):
    """Owns the table `embedding`."""

    config: T5Bias
    heads: int
    initializer: Init

    @nn.compact
    def __call__(self) -> Float[Array, "heads buckets"]:
        """The table."""
        shape = (self.heads, self.config.buckets)
        return parameter(self, "embedding", self.initializer.embedding(), shape, ("heads", None))


@functools.cache
def buckets_ahead(buckets: int, max_distance: int, causal: bool) -> Int[np.ndarray, " distances"]:
    """The bucket of j - i from -max_distance to max_distance."""
    past = np.asarray([bucket(n, buckets if causal else buckets // 2, max_distance) for n in range(max_distance + 1)])
    future = np.zeros_like(past) if causal else past + buckets // 2
    return np.concatenate([past[::-1], future[1:]])


def bucket(distance: int, buckets: int, max_distance: int) -> int:
    """`distance` below E = buckets / 2, else E + floor((buckets - E) log(distance / E) / log(max_distance / E)).

    The floor is found in whole numbers, so that no rounding of logarithms moves a distance into another bucket.
    """
    exact = buckets // 2
    if distance < exact:
        return distance
    steps = buckets - exact
    reached = (k for k in range(1, steps) if distance**steps * exact**k >= exact**steps * max_distance**k)
    return exact + sum(1 for _ in reached)
