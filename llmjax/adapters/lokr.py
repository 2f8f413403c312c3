"""LoKr: a Kronecker product of two small matrices (2309.14859), both of them whole in KronA (2212.10650)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.additive import Additive
from llmjax.adapters.base import Boxes, Call, boxed
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class LoKr(Additive):
    """W' = W + (alpha / rank) C kron D; C `[m, l]` starts at zero, D `[n, k]` is A B where that is smaller.

    The inputs (all their axes as one) are split into m n and the outputs into l k. Yeh et al. 2023. With a rank that
    leaves D whole it is KronA (Edalati et al. 2022).
    """

    rank: int = 8
    """rank of D; where it is at least half of D's longer side, D is one matrix"""
    alpha: float = 8.0
    """alpha / rank multiplies the change"""
    factor: int = -1
    """m and l are the largest divisors up to it of inputs and outputs; -1 for those nearest their square roots"""

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """C zero; D, or A and B, uniform in +-1/sqrt(inputs of each)."""
        (m, n), (lead, k) = self.sides(projection)
        drawn = {"c": jnp.zeros((m, lead))}
        if self.whole(n, k):
            drawn |= {"d": uniform(key, n, k)}
        else:
            keys = jax.random.split(key)
            drawn |= {"a": uniform(keys[0], n, self.rank), "b": uniform(keys[1], self.rank, k)}
        axes = {"a": (None, "rank"), "b": ("rank", None)}
        return {name: boxed(x, *axes.get(name, (None, None))) for name, x in drawn.items()}

    def sides(self, projection: Projection) -> tuple[tuple[int, int], tuple[int, int]]:
        """(m, n) and (l, k)."""
        inputs, outputs = math.prod(projection.inputs), math.prod(projection.outputs)
        return split(inputs, self.factor), split(outputs, self.factor)

    def whole(self, n: int, k: int) -> bool:
        """Whether D is one matrix."""
        return self.rank >= max(n, k) / 2

    def change(self, params: Any, projection: Projection, shared: Any) -> Float[Array, "..."]:
        """(alpha / rank) C kron D."""
        product = jnp.kron(params["c"], right(params))
        return self.alpha / self.rank * product.reshape(*projection.inputs, *projection.outputs)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """x W + b + (alpha / rank) C^T X D, X being x as `[m, n]`: the Kronecker product is never made."""
        (m, n), _ = self.sides(projection)
        lead = x.shape[: x.ndim - len(projection.inputs)]
        square = jnp.einsum("...mn,ml,nk->...lk", x.reshape(*lead, m, n), call.params["c"], right(call.params))
        return call.make() + self.alpha / self.rank * square.reshape(*lead, *projection.outputs)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.rank < 1:
            yield "rank", "must be at least 1"
        if self.factor != -1 and self.factor < 1:
            yield "factor", "must be at least 1, or -1 for the divisors nearest the square roots"


def uniform(key: PRNGKeyArray, *shape: int) -> Float[Array, "inputs outputs"]:
    """Uniform in +-1/sqrt(inputs)."""
    return jax.random.uniform(key, shape, minval=-1) / math.sqrt(shape[0])


def right(params: Any) -> Float[Array, "n k"]:
    """D."""
    return params["d"] if "d" in params else params["a"] @ params["b"]


def split(size: int, factor: int) -> tuple[int, int]:
    """size = m n: m is `factor` where that divides, else the largest divisor up to `factor` and the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    m = max(d for d in range(1, most + 1) if size % d == 0)
    return m, size // m
