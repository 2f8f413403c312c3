"""Kernels on plain arrays, each behind one function with several implementations. Imports jax only."""

from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import linear_cross_entropy

__all__ = ["attention", "linear_cross_entropy"]
