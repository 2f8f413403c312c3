"""Kernels on plain arrays, each behind one function with several implementations. Imports jax only."""

from pallas_kernels.attention import Mask, attention, merge_partials
from pallas_kernels.cross_entropy import linear_cross_entropy, linear_entropy, linear_kl, linear_token_losses
from pallas_kernels.decode_attention import decode_attention

__all__ = [
    "Mask",
    "attention",
    "decode_attention",
    "linear_cross_entropy",
    "linear_entropy",
    "linear_kl",
    "linear_token_losses",
    "merge_partials",
]
