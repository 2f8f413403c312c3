"""What a number format is: how a block of weights gets its scale, and how one weight becomes a code of a few bits.

A matrix `[inputs, outputs]` is read in the order of its transpose, output by output, and cut into blocks that share a
scale: the order of a torch weight `[out, in]`. Where the block does not divide the inputs, blocks run on into the next
output, and the last one may be short.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt8

Scales = Float[Array, "*blocks"]
Zeros = Num[Array, "*blocks"] | None
"""zero points: uint8 codes, real numbers, or none"""


@dataclass(frozen=True)
class Format(ABC):
    """Base of the formats: w ~ decode(code, scale of its block, zero point of its block)."""

    block: int | Literal["channel", "tensor"] = 64
    """weights that share a scale: a number of inputs of one output, all inputs of an output, or the whole matrix"""
    double: bool = False
    """whether the scales are quantised again, to 8 bits in blocks of 256 (see `llmjax.quant.double`)"""

    @property
    @abstractmethod
    def width(self) -> int:
        """Bits of a code."""

    @abstractmethod
    def fit(self, blocks: Float[Array, "*blocks size"]) -> tuple[Scales, Zeros]:
        """Scale and zero point of each block, such that no weight of it is clipped."""

    @abstractmethod
    def round(self, w: Float[Array, "..."], scales: Float[Array, "..."], zeros: Zeros) -> UInt8[Array, "..."]:
        """The nearest codes; scales and zero points broadcast against the weights."""

    @abstractmethod
    def decode(self, codes: UInt8[Array, "..."], scales: Float[Array, "..."], zeros: Zeros) -> Float[Array, "..."]:
        """The float32 values of codes; scales and zero points broadcast against them."""

    def size(self, inputs: int, outputs: int) -> int:
        """Weights a block in a matrix of that size."""
        if self.block == "channel":
            return inputs
        return inputs * outputs if self.block == "tensor" else self.block

    def problems(self) -> Iterator[tuple[str, str]]:
        """A block of nothing."""
        if not isinstance(self.block, str) and self.block < 1:
            yield "block", "must be at least 1, or 'channel' or 'tensor'"


def into_blocks(w: Num[Array, "*stack outputs inputs"], size: int) -> Num[Array, "*stack rows blocks size"]:
    """The blocks of a transposed matrix: a row an output where `size` divides the inputs, else all in one row.

    A short last block is filled up with its last weight, which changes no extreme of it.
    """
    *stack, outputs, inputs = w.shape
    if inputs % size == 0:
        return w.reshape(*stack, outputs, inputs // size, size)
    flat = w.reshape(*stack, 1, outputs * inputs)
    count = math.ceil(outputs * inputs / size)
    spare = [(0, 0)] * (flat.ndim - 1) + [(0, count * size - outputs * inputs)]
    return jnp.pad(flat, spare, mode="edge").reshape(*stack, 1, count, size)


def out_of_blocks(
    blocks: Num[Array, "*stack rows blocks size"], inputs: int, outputs: int
) -> Num[Array, "*stack outputs inputs"]:
    """The transposed matrix of its blocks."""
    *stack, rows, count, size = blocks.shape
    return blocks.reshape(*stack, rows * count * size)[..., : inputs * outputs].reshape(*stack, outputs, inputs)


def inverse(scales: Float[Array, "*blocks"]) -> Float[Array, "*blocks"]:
    """1 / scale, and 0 for a block of zeros."""
    return jnp.where(scales == 0, 0.0, 1 / jnp.where(scales == 0, 1.0, scales))


def rounded(w: Float[Array, "*stack outputs inputs"], form: Format) -> Float[Array, "*stack outputs inputs"]:
    """Q(W) of transposed matrices in float32: rounded to the nearest, each block by its own scale."""
    *_, outputs, inputs = w.shape
    blocks = into_blocks(w.astype(jnp.float32), form.size(inputs, outputs))
    scales, zeros = per_weight(*form.fit(blocks))
    return out_of_blocks(form.decode(form.round(blocks, scales, zeros), scales, zeros), inputs, outputs)


def per_weight(scales: Float[Array, "*blocks"], zeros: Zeros) -> tuple[Float[Array, "*blocks 1"], Zeros]:
    """Scales and zero points of blocks, with an axis for the weights of a block."""
    return scales[..., None], None if zeros is None else zeros[..., None]
