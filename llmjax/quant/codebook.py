"""Codebooks: a code is a place in a short table of levels, w ~ scale levels[code], the level nearest to w / scale."""

from abc import abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from llmjax.quant.formats import Format, Scales, Zeros, inverse


@dataclass(frozen=True)
class Codebook(Format):
    """Base of the codebooks of 16 levels in [-1, 1], scaled by the largest weight of the block."""

    @property
    def width(self) -> int:
        """4."""
        return 4

    @property
    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """The value of each code."""

    def fit(self, blocks: Float[Array, "*blocks size"]) -> tuple[Scales, Zeros]:
        """The largest weight's magnitude."""
        return jnp.max(jnp.abs(blocks), axis=-1), None

    def round(self, w: Float[Array, "..."], scales: Float[Array, "..."], zeros: Zeros) -> UInt8[Array, "..."]:
        """The code of the nearest level; half-way between two, the lower one's."""
        return nearest(w * inverse(scales), np.asarray(self.levels, np.float32))

    def decode(self, codes: UInt8[Array, "..."], scales: Float[Array, "..."], zeros: Zeros) -> Float[Array, "..."]:
        """scale x level."""
        return jnp.asarray(self.levels, jnp.float32)[codes] * scales.astype(jnp.float32)


def nearest(x: Float[Array, "..."], levels: Float[np.ndarray, " levels"]) -> UInt8[Array, "..."]:
    """The place in `levels`, in whatever order they stand, of the level nearest to each x."""
    order = np.argsort(levels, kind="stable")
    edges = (levels[order[:-1]] + levels[order[1:]]) / 2
    between = jnp.searchsorted(
        jnp.asarray(edges), x, side="left", method="compare_all" if levels.size <= 16 else "scan"
    )
    return jnp.asarray(order.astype(np.uint8))[between]
