"""Softmax attention: one function, several implementations."""

from pallas_kernels.attention.api import attention

__all__ = ["attention"]
