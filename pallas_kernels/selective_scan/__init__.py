"""The selective scan of Mamba: a diagonal state-space model whose step, input and output depend on the token."""

from pallas_kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
