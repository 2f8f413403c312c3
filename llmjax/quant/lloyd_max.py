"""Lloyd-Max: the codebook of least mean squared error for a distribution, as a fixed point of two conditions.

    edge_i = (level_{i-1} + level_i) / 2,      level_i = E[w | edge_i < w < edge_{i+1}]

For a normal distribution level_i = (phi(edge_i) - phi(edge_{i+1})) / (Phi(edge_{i+1}) - Phi(edge_i)); for samples it is
a mean, and the iteration is k-means on a line. Max 1960; Lloyd 1982.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmjax.quant.codebook import Codebook
from llmjax.quant.formats import Scales, Zeros


@dataclass(frozen=True)
class LloydMax(Codebook):
    """The best levels for normal weights; a block's scale is its root mean square, and what lies outside is clipped."""

    bits: int = 4
    """bits of a code, 1 to 8"""

    @property
    def width(self) -> int:
        """`bits`."""
        return self.bits

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels for N(0, 1), ascending."""
        return normal_optimum(2**self.bits)

    def fit(self, blocks: Float[Array, "*blocks size"]) -> tuple[Scales, Zeros]:
        """The root mean square."""
        return jnp.sqrt(jnp.mean(jnp.square(blocks), axis=-1)), None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Bits that are not of this kind."""
        yield from super().problems()
        if not 1 <= self.bits <= 8:
            yield "bits", "must be 1 to 8"


@lru_cache(maxsize=8)
def normal_optimum(count: int) -> tuple[float, ...]:
    """The `count` levels for N(0, 1), ascending; each is then within 1e-7 of its cell's mean."""
    normal = NormalDist()
    levels = np.asarray([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    move = 1.0
    while move > 1e-7:
        edges = np.concatenate([[-np.inf], (levels[:-1] + levels[1:]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
        mass = np.diff([normal.cdf(edge) for edge in edges])
        means = -np.diff(density) / mass
        move, levels = float(np.max(np.abs(means - levels))), means
    return tuple(levels.tolist())


def sample_optimum(
    samples: Float[np.ndarray, " samples"], count: int, steps: int = 1000
) -> Float[np.ndarray, " levels"]:
    """At most `count` ascending levels for samples, from their quantiles by at most `steps` steps of k-means."""
    samples = np.sort(np.asarray(samples, np.float64))
    sums = np.concatenate([[0.0], np.cumsum(samples)])
    levels = np.unique(np.quantile(samples, (np.arange(count) + 0.5) / count))
    for _ in range(steps):
        inner = np.searchsorted(samples, (levels[:-1] + levels[1:]) / 2)
        ends = np.unique(np.concatenate([[0], inner, [samples.size]]))
        means = np.diff(sums[ends]) / np.diff(ends)
        if np.array_equal(means, levels):
            break
        levels = means
    return levels
