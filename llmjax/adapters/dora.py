"""DoRA: a low-rank change of the direction of each column of W, and a length learned for it. 2402.09353."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Boxes, Call, boxed, kernel_of
from llmjax.adapters.lora import LoRA
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class DoRA(LoRA):
    """W' = m (W + s A B) / |W + s A B|, |.| over the inputs: one norm, and one m, for each output. Liu et al. 2024.

    The norm counts as a constant in the gradient (section 4.3). m starts as |W|, so that nothing changes. It rescales
    what stands before it: where several adapters change the same matrix, it comes first.
    """

    rounds: ClassVar[bool] = True

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """LoRA's A and B, and m = |W| `[*outputs]`."""
        magnitude = norms(kernel.astype(jnp.float32), projection)
        return super().start(key, projection, kernel) | {"magnitude": boxed(magnitude, *projection.output_axes)}

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """m (W + s A B) / |W + s A B|."""
        ratio = self.ratio(params, kernel, projection, shared).astype(kernel.dtype)
        return super().weight(params, kernel, projection, shared) * ratio

    def ratio(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """m / |W + s A B| `[*outputs]`, float32; of a column of zeros 0."""
        changed = super().weight(params, kernel.astype(jnp.float32), projection, shared)
        norm = jax.lax.stop_gradient(norms(changed, projection))
        return params["magnitude"] / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """x W + b + (c - 1) x W + c s (x A) B, c being the ratio: the base's product is not made twice."""
        y, kernel = call.make(), kernel_of(call.module, projection)
        ratio = self.ratio(call.params, kernel, projection, call.shared).astype(y.dtype)
        low = jnp.tensordot(call.dropout(x, self.dropout), call.params["a"], axes=len(projection.inputs))
        bias = meta.unbox(call.module.get_variable("params", "bias")) if projection.bias else 0
        return y + (ratio - 1) * (y - bias) + ratio * (self.scale * jnp.tensordot(low, call.params["b"], axes=1))


def norms(kernel: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
    """The Euclidean norm over the inputs, for each output."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(len(projection.inputs)))))
