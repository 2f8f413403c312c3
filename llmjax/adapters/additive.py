"""What methods share whose change of a matrix does not depend on it: W' = W + D."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.adapters.base import Call, ProjectionAdapter
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class Additive(ProjectionAdapter):
    """W' = W + D: the matrix W itself is never read, so that it may be stored in any form."""

    @abstractmethod
    def change(self, params: Any, projection: Projection, shared: Any) -> Float[Array, "..."]:
        """D `[*inputs, *outputs]`."""

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """W + D."""
        return kernel + self.change(params, projection, shared).astype(kernel.dtype)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """x W + b + x D."""
        change = self.change(call.params, projection, call.shared)
        return call.make() + jnp.tensordot(x, change.astype(x.dtype), axes=len(projection.inputs))
