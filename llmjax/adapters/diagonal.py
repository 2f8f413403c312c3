"""What low-rank methods share that weigh each of their directions: W' = W + s A diag(v) B."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.adapters.base import Call
from llmjax.adapters.lora import LoRA
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class Diagonal(LoRA):
    """LoRA with a factor for each direction of the change."""

    @abstractmethod
    def factors(self, params: Any) -> Float[Array, " rank"]:
        """The diagonal v."""

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """W + s A diag(v) B."""
        return super().weight({**params, "a": params["a"] * self.factors(params)}, kernel, projection, shared)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """x W + b + s ((x A) * v) B."""
        y = call.make()
        low = jnp.tensordot(call.dropout(x, self.dropout), call.params["a"], axes=len(projection.inputs))
        return y + self.scale * jnp.tensordot(low * self.factors(call.params), call.params["b"], axes=1)
