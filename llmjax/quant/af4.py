"""AF4, 4-bit AbnormalFloat: the levels of least mean absolute error for normal weights over their block's largest.

Yoshida 2023 (2306.06965), table for blocks of 64: what is rounded is w / max|w|, whose distribution depends on the
block. Each level is the median of its cell, -1, 0 and 1 being kept, and the cells next to 0 taken to reach to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llmjax.quant.codebook import Codebook

LEVELS = (
    *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
    *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
)


@dataclass(frozen=True)
class AF4(Codebook):
    """AbnormalFloat for blocks of 64."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The published table, ascending."""
        return LEVELS

    def problems(self) -> Iterator[tuple[str, str]]:
        """Blocks that the table was not made for."""
        if self.block != 64:
            yield "block", "must be 64: the levels depend on it"
