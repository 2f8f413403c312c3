"""Eight-bit floats: w ~ scale float8(w / scale), scale = max|w| of the block / the largest finite number.

e4m3 has four bits of exponent and three of mantissa, no infinity and 448 as its largest number; e5m2 reaches 57,344
with two bits of mantissa. Micikevicius et al. 2022 (2209.05433).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from llmjax.quant.formats import Format, Scales, Zeros, inverse


@dataclass(frozen=True)
class Float8(Format):
    """Eight-bit floats with a scale a block; a code is the number's bit pattern."""

    kind: Literal["e4m3", "e5m2"] = "e4m3"
    """bits of exponent and mantissa"""

    @property
    def width(self) -> int:
        """8."""
        return 8

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of jax."""
        return jnp.dtype(jnp.float8_e4m3fn if self.kind == "e4m3" else jnp.float8_e5m2)

    def fit(self, blocks: Float[Array, "*blocks size"]) -> tuple[Scales, Zeros]:
        """The scale that takes the block's largest weight to the largest number."""
        return jnp.max(jnp.abs(blocks), axis=-1) / float(jnp.finfo(self.dtype).max), None

    def round(self, w: Float[Array, "..."], scales: Float[Array, "..."], zeros: Zeros) -> UInt8[Array, "..."]:
        """To the nearest float8; beyond the largest number, to it."""
        largest = float(jnp.finfo(self.dtype).max)
        scaled = jnp.clip(w * inverse(scales), -largest, largest)
        return jax.lax.bitcast_convert_type(scaled.astype(self.dtype), jnp.uint8)

    def decode(self, codes: UInt8[Array, "..."], scales: Float[Array, "..."], zeros: Zeros) -> Float[Array, "..."]:
        """scale x float8."""
        return jax.lax.bitcast_convert_type(codes, self.dtype).astype(jnp.float32) * scales.astype(jnp.float32)
