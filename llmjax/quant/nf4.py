"""NF4, 4-bit NormalFloat: quantiles of a normal distribution, the two sides made apart so that 0 is exact.

    delta = 1 - (1/32 + 1/30) / 2 = 0.9677083
    positive: Phi^-1 of 8 even steps from delta towards 1/2;   negative: -Phi^-1 of 7;   all over the largest

Dettmers et al. 2023 (2305.14314), appendix E. A block's scale is its largest magnitude; the levels are quantiles of the
normal distribution before that scaling, and neither of equal use nor of least error after it (Yoshida 2023,
2306.06965).
"""

from dataclasses import dataclass

from llmjax.quant.codebook import Codebook

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""as published, float32; checkpoints hold these, and the formula gives them to 2e-7"""


@dataclass(frozen=True)
class NF4(Codebook):
    """Sixteen quantiles of a normal distribution: seven negative ones, 0 (code 7) and eight positive ones."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The table, ascending."""
        return LEVELS
