"""The one projection that all modules are made of: y = x W + b over named axes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float

from llmjax.nn.initializers import Initializer
from llmjax.nn.stored import Stored
from llmjax.parallel.mesh import sequence_axis


class Linear(nn.Module):
    """y = x W + b, contracting the last axes of x: `[..., *inputs] -> [..., *outputs]`.

    `kernel` is `[*inputs, *outputs]` and `bias` `[*outputs]`, float32 and annotated with logical axis names that
    `llmjax.parallel.mesh` maps to mesh axes; the product is computed in the dtype the parameters are given in. A kernel
    that is stored in another form multiplies in its own way.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    initial: Initializer
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Project; raises TypeError (from XLA) where the last axes of `x` are not `inputs`."""
        kernel = given(self, "kernel", self.initial, self.inputs + self.outputs, self.axes)
        count = len(self.inputs)
        if isinstance(kernel, Stored):
            y = kernel.dot(x, count)
        else:
            cpu = flat_product if sequence_axis() is None else product
            y = jax.lax.platform_dependent(x, kernel, cpu=partial(cpu, count), default=partial(product, count))
        if self.bias:
            y = y + parameter(self, "bias", jax.nn.initializers.zeros, self.outputs, self.axes[count:])
        return y


class Matrix(nn.Module):
    """Owns the `kernel` `[*inputs, *outputs]` of a projection and hands it out: its owner chooses when to multiply."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    initial: Initializer

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        """The kernel."""
        return parameter(self, "kernel", self.initial, self.inputs + self.outputs, self.axes)


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> Float[Array, "..."]:
    """Declare a float32 parameter with logical axis names, or return the value that the caller passed in, an array."""
    value = given(module, name, init, shape, axes)
    return value.dense() if isinstance(value, Stored) else value


def given(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> Float[Array, "..."] | Stored:
    """As `parameter`, in the form that the caller passed it in."""
    value: Any = meta.unbox(module.get_variable("params", name))
    if isinstance(value, Stored):
        return value
    boxed: Callable[..., Any] = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed, shape, jnp.float32)


def product(count: int, x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """Contract the last `count` axes of `x` with the first of `kernel`."""
    return jnp.tensordot(x, kernel, axes=count)


def flat_product(count: int, x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same as one product of two matrices.

    XLA on CPU copies an operand whose rows are spread over several axes, a seventh of a training step. Elsewhere the
    axes stay apart, and where the length is split: merged into a batch it would be gathered.
    """
    lead, outputs = x.shape[: x.ndim - count], kernel.shape[count:]
    inner = math.prod(kernel.shape[:count])
    y = x.reshape(math.prod(lead), inner) @ kernel.reshape(inner, math.prod(outputs))
    return y.reshape(*lead, *outputs)
