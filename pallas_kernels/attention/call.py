"""One checked call of attention, as every implementation receives it."""

from dataclasses import dataclass
from typing import Any

from pallas_kernels.attention.mask import Mask, Rule
from pallas_kernels.attention.vjp import Operands, Visible


@dataclass(frozen=True)
class Call:
    """Arrays, the mask as it was described, and the same as implementations evaluate it."""

    operands: Operands
    visible: Visible
    mask: Mask
    rule: Rule
    residual: bool = False
    """whether the log-sum-exp is wanted"""
    config: Any = None
    """block sizes of the implementation that was asked for; None lets it choose"""
