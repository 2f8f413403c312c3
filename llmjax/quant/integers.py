"""Integers of 2 to 8 bits on a uniform grid, symmetric about zero or with a zero point.

    none:     step = max|w| / (2^(b-1) - 1),   q = round(w / step),            w ~ q step
    integer:  step = (max - min) / (2^b - 1),  q = round(w / step) + z,        w ~ (q - z) step, z = round(-min / step)
    real:     the same step,                   q = round(w / step + z),        w ~ (q - z) step, z = -min / step

Jacob et al. 2017 (1712.05877). With an integer zero point 0 is exact and the range is widened to hold it; with a real
one the block's own extremes are. Either way no weight is off by more than half a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from llmjax.quant.formats import Format, Scales, Zeros, inverse


@dataclass(frozen=True)
class Integer(Format):
    """Integers of `bits` bits. Codes are unsigned: with no zero point, q + 2^(b-1)."""

    bits: int = 4
    """bits of a code, 2 to 8"""
    zero_point: Literal["none", "integer", "real"] = "none"
    """symmetric; affine with an integer zero point (uint8 a block); affine with a real one (float32 a block)"""

    @property
    def width(self) -> int:
        """`bits`."""
        return self.bits

    @property
    def top(self) -> int:
        """The largest code, or the largest q of the symmetric grid."""
        return 2**self.bits - 1 if self.zero_point != "none" else 2 ** (self.bits - 1) - 1

    def fit(self, blocks: Float[Array, "*blocks size"]) -> tuple[Scales, Zeros]:
        """Steps from absmax or range; a constant block with a real zero point is stored exactly."""
        if self.zero_point == "none":
            return jnp.max(jnp.abs(blocks), axis=-1) / self.top, None
        low, high = jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
        if self.zero_point == "integer":
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
            step = (high - low) / self.top
            return step, jnp.round(-low * inverse(step)).astype(jnp.uint8)
        step = jnp.where(high > low, (high - low) / self.top, low)
        return step, -low * inverse(step)

    def round(self, w: Float[Array, "..."], scales: Float[Array, "..."], zeros: Zeros) -> UInt8[Array, "..."]:
        """To the nearest grid point, halves to even; clipped to the grid."""
        q = w * inverse(scales)
        if self.zero_point == "none":
            return (jnp.clip(jnp.round(q), -self.top, self.top) + 2 ** (self.bits - 1)).astype(jnp.uint8)
        assert zeros is not None
        q = jnp.round(q) + zeros if self.zero_point == "integer" else jnp.round(q + zeros)
        return jnp.clip(q, 0, self.top).astype(jnp.uint8)

    def decode(self, codes: UInt8[Array, "..."], scales: Float[Array, "..."], zeros: Zeros) -> Float[Array, "..."]:
        """(code - zero point) step."""
        zero = 2.0 ** (self.bits - 1) if zeros is None else zeros.astype(jnp.float32)
        return (codes.astype(jnp.float32) - zero) * scales.astype(jnp.float32)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Bits that are not of this kind."""
        yield from super().problems()
        if not 2 <= self.bits <= 8:
            yield "bits", "must be 2 to 8"
