"""VeRA: two random matrices for the whole model, fixed, and vectors that scale them for each projection. 2310.11454."""

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
class VeRA(ProjectionAdapter):
    """y = x W + (((x A) d) B) b: A and B are random, shared, and never trained. Kopiczko et al. 2023.

    A `[most inputs, rank]` and B `[rank, most outputs]` are as large as the largest projection needs; others use their
    first rows and columns. `lambda_b` starts at zero: nothing changes.
    """

    rank: int = 256
    """rank of the shared matrices; a projection trains rank + outputs numbers"""
    initial: float = 0.1
    """what d starts at"""
    dropout: float = 0.0
    """probability that a feature of the adapter's input is dropped in training; tables and experts have none"""
    seed: int = 0
    """of the shared matrices: adapters of one seed share what they draw, whatever the seed of the run"""

    def draw_shared(self, key: PRNGKeyArray, model: Model) -> Boxes:
        """A and B, uniform with variance 2 / inputs (He et al. 2015, 1502.01852), drawn from the method's own seed."""
        found = self.found(model).values()
        inputs, outputs = (max(map(math.prod, sizes)) for sizes in zip(*((p.inputs, p.outputs) for p in found)))
        keys = jax.random.split(jax.random.key(self.seed))
        a = jax.random.uniform(keys[0], (inputs, self.rank), minval=-1) * math.sqrt(6 / inputs)
        b = jax.random.uniform(keys[1], (self.rank, outputs), minval=-1) * math.sqrt(6 / self.rank)
        return {"a": boxed(a, None, "rank"), "b": boxed(b, "rank", None)}

    def trains(self, leaf: str) -> bool:
        """The vectors; not what is shared."""
        return leaf.startswith("lambda_")

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """d constant, b zero."""
        d, b = jnp.full(self.rank, self.initial), jnp.zeros(projection.outputs)
        return {"lambda_d": boxed(d, "rank"), "lambda_b": boxed(b, *projection.output_axes)}

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """W + A diag(d) B diag(b)."""
        a, b = parts(shared, projection)
        change = jnp.tensordot(a * params["lambda_d"], b, axes=1) * params["lambda_b"]
        return kernel + change.astype(kernel.dtype)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """x W + b + (((x A) d) B) b."""
        a, b = parts(call.shared, projection)
        low = jnp.tensordot(call.dropout(x, self.dropout), a, axes=len(projection.inputs)) * call.params["lambda_d"]
        return call.make() + jnp.tensordot(low, b, axes=1) * call.params["lambda_b"]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.rank < 1:
            yield "rank", "must be at least 1"
        if not 0 <= self.dropout < 1:
            yield "dropout", "must be at least 0 and below 1"


def parts(shared: Any, projection: Projection) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The shared matrices cut to a projection: `[*inputs, rank]`, `[rank, *outputs]`."""
    inputs, outputs = math.prod(projection.inputs), math.prod(projection.outputs)
    a, b = shared["a"][:inputs], shared["b"][:, :outputs]
    return a.reshape(*projection.inputs, a.shape[1]), b.reshape(b.shape[0], *projection.outputs)
