"""The delta rule: linear attention that replaces what a key held before, with a decay."""

from pallas_kernels.gated_delta_rule.api import gated_delta_rule

__all__ = ["gated_delta_rule"]
