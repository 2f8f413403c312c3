"""Cross-entropy, entropy and divergence of linear heads without the full logits."""

from pallas_kernels.cross_entropy.divergence import linear_entropy, linear_kl
from pallas_kernels.cross_entropy.linear import TokenLosses, linear_cross_entropy, linear_token_losses

__all__ = ["TokenLosses", "linear_cross_entropy", "linear_entropy", "linear_kl", "linear_token_losses"]
