"""IA3: learned vectors that rescale inner activations. Liu et al. 2022 (2205.05638)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Boxes, Call, ProjectionAdapter, boxed
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class IA3(ProjectionAdapter):
    """y = l * (x W + b), or y = (l * x) W + b for matrices that write to the stream; l begins at 1.

    So keys and values are rescaled, and of a feed-forward layer, gated or not, the hidden activations.
    """

    targets: str = "/(key|value|down)$"
    """which projections: a preset (all-linear, attention, qv, q, mlp) or a regular expression of their paths"""

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """Ones, of the shape of the side that is rescaled."""
        shape, axes = (projection.outputs, projection.output_axes)
        if writes(projection):
            shape, axes = (projection.inputs, projection.input_axes)
        return {"factor": boxed(jnp.ones(shape), *axes)}

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """W with its rows or its columns rescaled."""
        factor = params["factor"].astype(kernel.dtype)
        return kernel * (factor[(..., *(None,) * len(projection.outputs))] if writes(projection) else factor)

    def bias(self, params: Any, bias: Float[Array, "..."], projection: Projection, shared: Any) -> Float[Array, "..."]:
        """b rescaled with the outputs."""
        return bias if writes(projection) else bias * params["factor"].astype(bias.dtype)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """One product for each input or output more."""
        if writes(projection):
            return call.make(x * call.params["factor"].astype(x.dtype))
        y = call.make()
        return y * call.params["factor"].astype(y.dtype)


def writes(projection: Projection) -> bool:
    """Whether a matrix writes to the residual stream, so that its inner side is that of its inputs."""
    return projection.output_axes == ("d_model",)
