"""What a quantised matrix is made of, and the dense matrix that it stands for."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


class Weights(NamedTuple):
    """A matrix W `[inputs, outputs]`, an output a row: W[i, o] = scale * (code - zero), or scale * level[code]."""

    codes: UInt8[Array, "outputs bytes"]
    """of 8 bits, or of 4, two a byte, the first in the high bits"""
    scales: Float[Array, "outputs blocks"]
    """float32; a block is inputs / blocks consecutive inputs of one output"""
    zeros: Float[Array, "outputs blocks"] | None
    """float32; None for the middle code, 2^(bits - 1)"""


@dataclass(frozen=True)
class Form:
    """How the codes are read."""

    inputs: int
    bits: int
    levels: tuple[float, ...] | None
    """the value of each code; None for integers"""

    @property
    def packed(self) -> int:
        """Codes a byte."""
        return 8 // self.bits

    def size(self, blocks: int) -> int:
        """Inputs of a block."""
        return self.inputs // blocks

    @property
    def middle(self) -> float:
        """The zero point where there is none."""
        return 2.0 ** (self.bits - 1)


def transposed(weights: Weights, form: Form) -> Float[Array, "outputs inputs"]:
    """W^T in float32."""
    shifts = jnp.arange(8 - form.bits, -1, -form.bits, dtype=jnp.uint8)
    outputs, blocks = weights.scales.shape
    codes = weights.codes[:, :, None] >> shifts & (2**form.bits - 1)
    codes = codes.reshape(outputs, blocks, form.inputs // blocks)
    if form.levels is None:
        zeros = form.middle if weights.zeros is None else weights.zeros[..., None]
        values = codes.astype(jnp.float32) - zeros
    else:
        values = jnp.asarray(form.levels, jnp.float32)[codes]
    return (values * weights.scales[..., None]).reshape(outputs, form.inputs)
