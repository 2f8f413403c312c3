"""LoRA: a low-rank change of weight matrices, W' = W + s A B. Hu et al. 2021 (2106.09685)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Boxes, Call, ProjectionAdapter, boxed
from llmjax.nn.model import Model
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class LoRA(ProjectionAdapter):
    """y = x W + s (dropout(x) A) B; A `[*inputs, rank]` uniform, B `[rank, *outputs]` zero: it starts as the identity.

    s = alpha / rank, or alpha / sqrt(rank) where stabilised (rsLoRA: Kalajdzievski 2023, 2312.03732).
    """

    rank: int = 8
    """rank of the change, at most that of the matrix"""
    alpha: float = 16.0
    """numerator of the scale"""
    dropout: float = 0.0
    """probability that a feature of the adapter's input is dropped in training; tables and experts have none"""
    stabilised: bool = False
    """whether the scale falls with the root of the rank, so that high ranks learn as fast as low ones"""

    @property
    def scale(self) -> float:
        """What multiplies A B."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """A uniform in +-1/sqrt(inputs) (the default of torch's Linear, as peft draws it), B zero."""
        limit = 1 / math.sqrt(math.prod(projection.inputs))
        a = jax.random.uniform(key, (*projection.inputs, self.rank), minval=-limit, maxval=limit)
        b = jnp.zeros((self.rank, *projection.outputs))
        return {"a": boxed(a, *projection.input_axes, "rank"), "b": boxed(b, "rank", *projection.output_axes)}

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """W + s A B."""
        return kernel + self.scale * jnp.tensordot(params["a"], params["b"], axes=1).astype(kernel.dtype)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """x W + b + s (x A) B, 2 rank (inputs + outputs) more FLOPs a token."""
        y = call.make()
        low = jnp.tensordot(call.dropout(x, self.dropout), call.params["a"], axes=len(projection.inputs))
        return y + self.scale * jnp.tensordot(low, call.params["b"], axes=1)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Targets that are not there, and ranks above theirs."""
        yield from super().problems_in(model)
        yield from rank_problems(self.rank, self.found(model))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.rank < 1:
            yield "rank", "must be at least 1"
        if not 0 <= self.dropout < 1:
            yield "dropout", "must be at least 0 and below 1"


def rank_problems(rank: int, found: dict[str, Projection]) -> Iterator[tuple[str, str]]:
    """A rank above that of a matrix that it is to change."""
    for path, p in found.items():
        full = min(math.prod(p.inputs), math.prod(p.outputs))
        if rank > full:
            yield "rank", f"exceeds the {full} of {path}: use at most {full}, or other targets"
            return
