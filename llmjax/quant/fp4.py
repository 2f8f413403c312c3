"""Four-bit floats: a sign, two bits of exponent and one of mantissa, in the two ways that are in use.

    E2M1 (Open Compute Project, Microscaling Formats 1.0):  0, 1/2, 1, 3/2, 2, 3, 4, 6   over 6
    bitsandbytes:  0, 1/16, 8, 12, 4, 6, 2, 3   over 12, in the order of its codes

The highest bit of a code is the sign.
"""

from dataclasses import dataclass

from llmjax.quant.codebook import Codebook

MICROSCALING = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BITSANDBYTES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True)
class E2M1(Codebook):
    """The four-bit float of the Open Compute Project; a code is the number's bit pattern (that of 0 may be -0's)."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The table in the order of bit patterns."""
        return signed(MICROSCALING)


@dataclass(frozen=True)
class FP4(Codebook):
    """The four-bit float of bitsandbytes."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The table in the order of bitsandbytes' codes."""
        return signed(BITSANDBYTES)


def signed(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """The magnitudes and their negatives, over the largest."""
    top = max(magnitudes)
    return tuple(m / top for m in magnitudes) + tuple(-m / top for m in magnitudes)
