"""Cross-entropy of a linear head without the full logits."""

from pallas_kernels.cross_entropy.api import TokenLosses, linear_cross_entropy

__all__ = ["TokenLosses", "linear_cross_entropy"]
