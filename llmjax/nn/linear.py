"""The one projection that all modules are made of: y = x W + b over named axes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.nn.initializers import Initializer


class Linear(nn.Module):
    """y = x W + b, contracting the last axes of x: `[..., *inputs] -> [..., *outputs]`.

    `kernel` is `[*inputs, *outputs]` and `bias` `[*outputs]`, float32 and annotated with logical axis names that
    `llmjax.parallel.mesh` maps to mesh axes; the product is computed in the dtype the parameters are given in.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    initial: Initializer
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Project; raises TypeError (from XLA) where the last axes of `x` are not `inputs`."""
        kernel = parameter(self, "kernel", self.initial, self.inputs + self.outputs, self.axes)
        count = len(self.inputs)
        contract = (tuple(range(x.ndim - count, x.ndim)), tuple(range(count)))
        y = jax.lax.dot_general(x, kernel, (contract, ((), ())))
        if self.bias:
            y = y + parameter(self, "bias", jax.nn.initializers.zeros, self.outputs, self.axes[count:])
        return y


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> Float[Array, "..."]:
    """Declare a float32 parameter with logical axis names, or return the value that the caller passed in."""
    boxed: Callable[..., Any] = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed, shape, jnp.float32)
