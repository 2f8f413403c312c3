"""DyLoRA: LoRA of all ranks up to one at once; training samples how many directions count. 2210.07558."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.adapters.base import Call
from llmjax.adapters.diagonal import Diagonal
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class DyLoRA(Diagonal):
    """W' = W + s A_:,1..n B_1..n,: with n uniform from `least` to `rank` in training. Valipour et al. 2022.

    Afterwards any `active` rank may be used. Tables and experts, which see no key, always use the active rank.
    """

    least: int = 1
    """smallest rank that training samples"""
    active: int | None = None
    """directions that count where nothing is sampled; None for all"""

    def factors(self, params: Any) -> Float[Array, " rank"]:
        """1 for the directions that count, 0 for the others."""
        return first(self.rank, self.rank if self.active is None else self.active)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """x W + b + s x A B, of the sampled number of directions in training."""
        if not call.module.has_rng("dropout"):
            return super().output(call, x, projection)
        count = jax.random.randint(call.module.make_rng("dropout"), (), self.least, self.rank + 1)
        y = call.make()
        low = jnp.tensordot(call.dropout(x, self.dropout), call.params["a"], axes=len(projection.inputs))
        return y + self.scale * jnp.tensordot(low * first(self.rank, count), call.params["b"], axes=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if not 1 <= self.least <= self.rank:
            yield "least", f"must be from 1 to the rank, {self.rank}"
        if self.active is not None and not 0 <= self.active <= self.rank:
            yield "active", f"must be from 0 to the rank, {self.rank}, or None"


def first(rank: int, count: Any) -> Float[Array, " rank"]:
    """`count` ones, then zeros."""
    return (jnp.arange(rank) < count).astype(jnp.float32)
