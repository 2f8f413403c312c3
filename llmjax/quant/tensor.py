"""A quantised parameter: packed codes, scales and zero points in the place of an array.

The matrix that is stored, S `[inputs, outputs]`, may be another than the parameter W, so that it rounds better:

    x W = P(R(x g)) S      g a factor for each input, R a rotation of the inputs, P a permutation of them

Each is there only where a method put it. Codes and scales stand in the order of a torch weight `[out, in]`, one row an
output where every row starts a byte (a block), else all in one row, so that their bytes in memory are those of
bitsandbytes.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from llmjax.nn.stored import Stored
from llmjax.quant.double import DoubleScales, double_quantise
from llmjax.quant.fake import fake_quantise
from llmjax.quant.formats import Format, Zeros, into_blocks, out_of_blocks, per_weight
from llmjax.quant.hadamard import rotate
from llmjax.quant.integers import Integer
from llmjax.quant.matmul import product
from llmjax.quant.packing import pack, unpack


@dataclass(frozen=True)
class Layout:
    """Which axes of an unstacked parameter are what: `[*batch, *inputs, *outputs]`."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    """axes of matrices side by side, such as experts"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.batch + self.inputs + self.outputs

    @property
    def rows(self) -> int:
        """Inputs of the matrix."""
        return math.prod(self.inputs)

    @property
    def columns(self) -> int:
        """Outputs of the matrix."""
        return math.prod(self.outputs)

    def transposed(self, array: Float[Array, "..."]) -> Float[Array, "*stack outputs inputs"]:
        """A parameter, stacked or not, as transposed matrices."""
        stack = array.shape[: array.ndim - len(self.shape)]
        return jnp.swapaxes(array.reshape(*stack, *self.batch, self.rows, self.columns), -1, -2)

    def array(self, transposed: Float[Array, "*stack outputs inputs"]) -> Float[Array, "..."]:
        """The parameter of transposed matrices."""
        stack = transposed.shape[: transposed.ndim - 2 - len(self.batch)]
        return jnp.swapaxes(transposed, -1, -2).reshape(*stack, *self.shape)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros", "order", "gain"],
    meta_fields=["format", "layout", "rotated", "activations", "kind"],
)
@dataclass(frozen=True)
class QTensor(Stored):
    """A parameter in `format`; what is static describes it unstacked."""

    codes: UInt8[Array, "*stack rows bytes"]
    scales: Float[Array, "*stack rows blocks"] | DoubleScales
    zeros: Zeros
    format: Format
    layout: Layout
    order: Int[Array, "*stack inputs"] | None = None
    """P: the input that each row of S belongs to"""
    gain: Float[Array, "*stack inputs"] | None = None
    """g, float32"""
    rotated: bool = False
    """whether R is a Hadamard rotation"""
    activations: int | None = None
    """bits that P(R(x g)) is rounded to, each token by its own scale; None for none"""
    kind: str = "float32"
    """name of the dtype that the parameter is handed out in"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter, the stack axis included."""
        return self.codes.shape[: self.codes.ndim - 2 - len(self.layout.batch)] + self.layout.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype that the parameter is handed out in."""
        return jnp.dtype(self.kind)

    def astype(self, dtype: DTypeLike) -> Self:
        """The same, handed out in another dtype."""
        return replace(self, kind=jnp.dtype(dtype).name)

    def transposed(self) -> Float[Array, "*stack outputs inputs"]:
        """S, transposed, float32."""
        layout = self.layout
        stack, size = self.codes.shape[:-2], self.format.size(layout.rows, layout.columns)
        count = layout.rows * layout.columns // self.codes.shape[-2]
        codes = unpack(self.codes, self.format.width, count).reshape(*stack, layout.columns, layout.rows)
        scales = self.scales.values() if isinstance(self.scales, DoubleScales) else self.scales
        values = self.format.decode(into_blocks(codes, size), *per_weight(scales, self.zeros))
        return out_of_blocks(values, layout.rows, layout.columns)

    def dense(self) -> Float[Array, "..."]:
        """The parameter: g R(P^-1(S))."""
        matrix = self.transposed()
        if self.order is not None:
            matrix = jnp.take_along_axis(matrix, jnp.argsort(self.order)[..., None, :], axis=-1)
        if self.rotated:
            matrix = rotate(matrix)
        if self.gain is not None:
            matrix = matrix * self.gain[..., None, :]
        return self.layout.array(matrix).astype(self.dtype)

    def dot(self, x: Float[Array, "..."], count: int) -> Float[Array, "..."]:
        """x W over the last `count` axes of x, with gradients to x alone.

        Raises ValueError where these are not the parameter's inputs.
        """
        layout = self.layout
        if layout.batch or x.shape[x.ndim - count :] != layout.inputs:
            raise ValueError(f"activations of shape {x.shape} do not fit a quantised {layout}")
        dtype = jnp.promote_types(x.dtype, self.dtype)
        x = x.reshape(*x.shape[: x.ndim - count], layout.rows).astype(dtype)
        y = product(self.prepared(x), self)
        return y.reshape(*y.shape[:-1], *layout.outputs)

    def prepared(self, x: Float[Array, "... inputs"]) -> Float[Array, "... inputs"]:
        """P(R(x g)), rounded where activations are."""
        if self.gain is not None:
            x = x * jax.lax.stop_gradient(self.gain).astype(x.dtype)
        if self.rotated:
            x = rotate(x)
        if self.order is not None:
            x = jnp.take(x, self.order, axis=-1)
        return x if self.activations is None else fake_quantise(x, Integer(bits=self.activations, block="channel"))


def stored(
    codes: UInt8[Array, "*stack outputs inputs"],
    scales: Float[Array, "*stack rows blocks"],
    zeros: Zeros,
    form: Format,
    layout: Layout,
) -> QTensor:
    """The tensor of transposed codes, packed, and its scales, in 8 bits where the format says so."""
    *stack, outputs, inputs = codes.shape
    if inputs * form.width % 8:
        codes = codes.reshape(*stack, 1, outputs * inputs)
    zero = form.round(jnp.zeros(()), jnp.ones(()), None if zeros is None else jnp.zeros(()))
    packed = pack(codes, form.width, zero)
    return QTensor(packed, double_quantise(scales) if form.double else scales, zeros, form, layout)
