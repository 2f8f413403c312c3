"""Feature maps phi: phi(x)^T phi(y) is, or estimates, the kernel that linear attention weighs values by."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class FeatureMap(ABC):
    """phi: `[..., head_dim] -> [..., size(head_dim)]`, float32, each token for itself."""

    @abstractmethod
    def size(self, head_dim: int) -> int:
        """How many features a token has."""

    @abstractmethod
    def features(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """phi(x)."""

    def up_to_factor(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """phi(x) times a positive number of each token that keeps it in range: for queries that are normalised.

        A normaliser cancels the factor of a query. A factor of the keys must be the same for all of them, so that it
        would have to look at later tokens and at other documents.
        """
        return self.features(x)


@dataclass(frozen=True)
class Identity(FeatureMap):
    """phi(x) = x: attention without softmax."""

    def size(self, head_dim: int) -> int:
        """head_dim."""
        return head_dim

    def features(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """x."""
        return x.astype(jnp.float32)


@dataclass(frozen=True)
class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1, above 0. Katharopoulos et al. 2020 (2006.16236)."""

    def size(self, head_dim: int) -> int:
        """head_dim."""
        return head_dim

    def features(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """x + 1 above zero, exp(x) below."""
        return jax.nn.elu(x.astype(jnp.float32)) + 1


@dataclass(frozen=True)
class Relu(FeatureMap):
    """phi(x) = max(x, 0) (Choromanski et al. 2020, 2009.14794, section 4; Qin et al. 2022, 2202.08791)."""

    def size(self, head_dim: int) -> int:
        """head_dim."""
        return head_dim

    def features(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """max(x, 0)."""
        return jax.nn.relu(x.astype(jnp.float32))


@dataclass(frozen=True)
class RandomFeatures(FeatureMap, ABC):
    """phi(x) = h(x) f(w_i^T x) / sqrt(count) with fixed random directions w_i. Choromanski et al. 2020 (2009.14794).

    The directions are constants made from `seed`, the same for all heads; layers that share a config share them.
    """

    count: int = 64
    """random directions; the error falls like 1 / sqrt(count)"""
    orthogonal: bool = True
    """whether directions are orthogonal in blocks of head_dim, which lowers the variance, or independent"""
    regularised: bool = False
    """whether all directions have length sqrt(head_dim) (SMREG: less variance, some bias) or that of normal vectors"""
    scale: float | None = None
    """factor of x; None is head_dim^(-1/4), with which exp(x^T y) is what softmax attention weighs by"""
    seed: int = 0
    """of the directions"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.count < 1:
            yield "count", "must be at least 1"
        if self.scale is not None and self.scale <= 0:
            yield "scale", "must be above 0"

    def project(self, x: Float[Array, "... head_dim"]) -> tuple[Float[Array, "... count"], Float[Array, "... 1"]]:
        """w_i^T x for each direction, and |x|^2 / 2, of the scaled x."""
        dim = x.shape[-1]
        x = x.astype(jnp.float32) * (dim**-0.25 if self.scale is None else self.scale)
        w = random_directions(jax.random.key(self.seed), self.count, dim, self.orthogonal, self.regularised)
        return jnp.matmul(x, w.T, precision="highest"), jnp.sum(x * x, axis=-1, keepdims=True) / 2


@dataclass(frozen=True)
class Trigonometric(RandomFeatures):
    """h(x) (sin(w_i^T x), cos(w_i^T x)) / sqrt(count). Rahimi and Recht 2007; Peng et al. 2021 (2103.02143).

    Unbiased for exp(x^T y) with h = exp(|x|^2 / 2), for exp(-|x - y|^2 / 2) with h = 1. Products may be negative.
    """

    kernel: Literal["softmax", "gaussian"] = "softmax"
    """what is estimated"""

    def size(self, head_dim: int) -> int:
        """Two for each direction."""
        return 2 * self.count

    def features(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """Sines, then cosines."""
        phi = self.up_to_factor(x)
        return phi * jnp.exp(self.project(x)[1]) if self.kernel == "softmax" else phi

    def up_to_factor(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """Without h."""
        angle, _ = self.project(x)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1) / math.sqrt(self.count)


@dataclass(frozen=True)
class Angular(RandomFeatures):
    """sign(w_i^T x) / sqrt(count): unbiased for 1 - 2 angle(x, y) / pi. Charikar 2002. No gradient reaches x."""

    def size(self, head_dim: int) -> int:
        """One for each direction."""
        return self.count

    def features(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """Signs."""
        return jnp.sign(self.project(x)[0]) / math.sqrt(self.count)


@dataclass(frozen=True)
class Positive(RandomFeatures):
    """exp(w_i^T x - |x|^2 / 2) / sqrt(count), unbiased for exp(x^T y): the FAVOR+ features of the Performer."""

    def size(self, head_dim: int) -> int:
        """One for each direction."""
        return self.count

    def exponents(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """What the features are the exponentials of."""
        projected, half_square = self.project(x)
        return projected - half_square - math.log(self.count) / 2

    def features(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """At most exp(|w_i|^2 / 2), about exp(head_dim / 2)."""
        return jnp.exp(self.exponents(x))

    def up_to_factor(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """The largest feature of each token is 1."""
        exponents = self.exponents(x)
        return jnp.exp(exponents - jax.lax.stop_gradient(jnp.max(exponents, axis=-1, keepdims=True)))


@dataclass(frozen=True)
class Hyperbolic(Positive):
    """Positive features of w_i and of -w_i, over sqrt(2): at most half the variance of `Positive` of equal count."""

    def size(self, head_dim: int) -> int:
        """Two for each direction."""
        return 2 * self.count

    def exponents(self, x: Float[Array, "... head_dim"]) -> Float[Array, "... features"]:
        """Both signs."""
        projected, half_square = self.project(x)
        both = jnp.concatenate([projected, -projected], axis=-1)
        return both - half_square - math.log(2 * self.count) / 2


def random_directions(
    key: Array, count: int, dim: int, orthogonal: bool, regularised: bool
) -> Float[Array, "count dim"]:
    """Rows of isotropic direction, and of the length of normal vectors or sqrt(dim).

    Orthogonal rows are those of Haar-distributed matrices, one for each block of `dim` rows (the last one cut): a Q of
    QR is Haar only after its columns are multiplied by the signs of R's diagonal, as `jax.random.orthogonal` does.
    Yu et al. 2016 (1610.09072).
    """
    angle, length = jax.random.split(key)
    if orthogonal:
        rows = jax.random.orthogonal(angle, dim, (-(-count // dim),)).reshape(-1, dim)[:count]
    else:
        rows = jax.random.normal(angle, (count, dim))
        rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    if regularised:
        return rows * math.sqrt(dim)
    return rows * jnp.linalg.norm(jax.random.normal(length, (count, dim)), axis=-1, keepdims=True)
