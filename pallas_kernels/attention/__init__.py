"""Softmax attention: one function, several implementations."""

from pallas_kernels.attention.api import attention
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.merge import merge_partials

__all__ = ["Mask", "attention", "merge_partials"]
