"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products. Karimi Mahabadi et al. 2021."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Boxes, Call, boxed
from llmjax.adapters.bottleneck import Bottleneck
from llmjax.nn.mlp import activation
from llmjax.nn.model import Model


@dataclass(frozen=True)
class Compacter(Bottleneck):
    """A `Bottleneck` with A = sum_i R_i kron (s_i t_i), and B alike; the R_i `[n, n]` are shared by all layers.

    2106.04647, section 3; hypercomplex (PHM) products: Zhang et al. 2021 (2102.08597). d_model + size weights for each
    matrix of rank 1 instead of d_model size.
    """

    terms: int = 4
    """n, Kronecker products that are summed, and the size of the shared matrices; divides d_model and size"""
    rank: int = 1
    """rank of each s_i t_i"""

    def draw_shared(self, key: PRNGKeyArray, model: Model) -> Boxes:
        """R `[n, n, n]`, normal of variance 1/n."""
        return {"rule": boxed(jax.random.normal(key, (self.terms,) * 3) * self.terms**-0.5, None, None, None)}

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """s `[n, inputs / n, rank]` and t `[n, rank, outputs / n]` of both matrices; t of the second is zero."""
        d: int = module.d_model
        n, rank, keys = self.terms, self.rank, jax.random.split(key, 3)
        down, up = (
            jax.random.normal(k, (n, m // n, rank)) * (n / m) ** 0.5
            for k, m in zip(keys[:2], (d, self.size), strict=True)
        )
        return {
            "down_s": boxed(down, None, "d_model", "rank"),
            "down_t": boxed(jax.random.normal(keys[2], (n, rank, self.size // n)), None, "rank", None),
            "down_bias": boxed(jnp.zeros(self.size), "rank"),
            "up_s": boxed(up, None, None, "rank"),
            "up_t": boxed(jnp.zeros((n, rank, d // n)), None, "rank", "d_model"),
            "up_bias": boxed(jnp.zeros(d), "d_model"),
        }

    def change(self, call: Call, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_model"]:
        """f(x A + a) B + b, neither matrix written out."""
        p, rule = call.params, call.shared["rule"]
        low = kronecker_product(x, rule, p["down_s"], p["down_t"]) + p["down_bias"]
        return kronecker_product(activation(self.activation)(low), rule, p["up_s"], p["up_t"]) + p["up_bias"]

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """A width that does not split."""
        yield from super().problems_in(model)
        d = getattr(model, "d_model", None)
        if d is not None and self.terms > 0 and d % self.terms:
            yield "terms", f"does not divide d_model={d}: use a divisor"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.rank < 1:
            yield "rank", "must be at least 1"
        if self.terms < 1 or self.size % self.terms:
            yield "terms", f"does not divide size={self.size}: use a divisor"


def kronecker_product(
    x: Float[Array, "... inputs"],
    rule: Float[Array, "n n n"],
    s: Float[Array, "n part rank"],
    t: Float[Array, "n rank piece"],
) -> Float[Array, "... outputs"]:
    """x sum_i kron(rule_i, s_i t_i)."""
    n = len(rule)
    low = jnp.einsum("...ab,ibr->...iar", x.reshape(*x.shape[:-1], n, -1), s)
    y = jnp.einsum("...ipr,irq->...pq", jnp.einsum("...iar,iap->...ipr", low, rule), t)
    return y.reshape(*y.shape[:-2], -1)
