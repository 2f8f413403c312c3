"""PiSSA: the largest singular directions of W move into A B, and train; the rest stays. 2404.02948."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import ADAPTERS, Boxes, boxed
from llmjax.adapters.lora import LoRA
from llmjax.config import ConfigError
from llmjax.nn.projections import Projection, projection_of
from llmjax.nn.stored import Stored


@dataclass(frozen=True)
class Residual(LoRA):
    """LoRA whose A and B start as a part of W: when they are drawn, W becomes W - s A B, and what is computed stays.

    A matrix that is quantised cannot give a part away: it would have to be quantised again.
    """

    moves: ClassVar[bool] = True

    @abstractmethod
    def factors(self, kernel: Float[Array, "inputs outputs"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """A `[inputs, rank]` and B `[rank, outputs]`: s A B leaves W."""

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """The factors in the shape of W."""
        axes = len(projection.inputs)
        matrix = kernel.astype(jnp.float32).reshape(-1, kernel[(0,) * axes].size)
        left, right = self.factors(matrix)
        a, b = left.reshape(*projection.inputs, self.rank), right.reshape(self.rank, *projection.outputs)
        return {"a": boxed(a, *projection.input_axes, "rank"), "b": boxed(b, "rank", *projection.output_axes)}

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """The factors; what they hold leaves the module's matrix.

        Raises ConfigError where the matrix is not stored as an array.
        """
        projection = projection_of(module)
        assert projection is not None
        held: Any = module.get_variable("params", projection.leaf)
        if isinstance(meta.unbox(held), Stored):
            raise ConfigError(
                f"{type(self).__name__} moves a part of {'/'.join(module.path)} into the adapter, which is quantised: "
                "start it on the model in full precision, or use LoRA"
            )
        drawn = super().draw(key, module)
        # Linen asks for the shapes of what is already there by drawing it once more, abstractly.
        if module.is_mutable_collection("params") and not module.has_variable("params", ADAPTERS):
            rest = self.rest if projection.experts is None else jax.vmap(self.rest)
            kernel = rest(drawn["a"].value, drawn["b"].value, meta.unbox(held))
            module.put_variable("params", projection.leaf, meta.replace_boxed(held, kernel))
        return drawn

    def rest(self, a: Float[Array, "..."], b: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
        """W - s A B."""
        return kernel - (self.scale * jnp.tensordot(a, b, axes=1)).astype(kernel.dtype)


@dataclass(frozen=True)
class PiSSA(Residual):
    """A = U_r sqrt(S_r / s), B = sqrt(S_r / s) V_r^T of W = U S V^T. Meng et al. 2024 (2404.02948)."""

    def factors(self, kernel: Float[Array, "inputs outputs"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The first singular vectors, each with the root of its value."""
        u, values, v = jnp.linalg.svd(kernel, full_matrices=False)
        roots = jnp.sqrt(values[: self.rank] / self.scale)
        return u[:, : self.rank] * roots, roots[:, None] * v[: self.rank]
