"""LoHa: the elementwise product of two low-rank matrices, of rank up to rank^2. FedPara: 2108.06098."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.additive import Additive
from llmjax.adapters.base import Boxes, boxed
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class LoHa(Additive):
    """W' = W + (alpha / rank) (A1 B1) * (A2 B2), * elementwise. Hyeon-Woo et al. 2021; LyCORIS, 2309.14859.

    A2 starts at zero, the others uniform: nothing changes.
    """

    rank: int = 8
    """rank of each of the two products"""
    alpha: float = 8.0
    """alpha / rank multiplies the change"""

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """Uniform in +-1/sqrt(fan in), as peft draws them: fan in is the rank for B, the inputs for A."""
        ins, outs = (*projection.inputs, self.rank), (self.rank, *projection.outputs)
        shapes = {"a1": ins, "b1": outs, "b2": outs}
        limits = {"a": 1 / math.sqrt(math.prod(projection.inputs)), "b": 1 / math.sqrt(self.rank)}
        keys = jax.random.split(key, len(shapes))
        drawn = {
            name: jax.random.uniform(k, shape, minval=-limits[name[0]], maxval=limits[name[0]])
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        } | {"a2": jnp.zeros(ins)}
        names = {"a": (*projection.input_axes, "rank"), "b": ("rank", *projection.output_axes)}
        return {name: boxed(x, *names[name[0]]) for name, x in drawn.items()}

    def change(self, params: Any, projection: Projection, shared: Any) -> Float[Array, "..."]:
        """(alpha / rank) (A1 B1) * (A2 B2)."""
        one, two = (jnp.tensordot(params[f"a{i}"], params[f"b{i}"], axes=1) for i in (1, 2))
        return self.alpha / self.rank * one * two

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.rank < 1:
            yield "rank", "must be at least 1"
