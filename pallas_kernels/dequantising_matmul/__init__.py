"""Products with matrices that are stored in few bits."""

from pallas_kernels.dequantising_matmul.api import dequantising_matmul

__all__ = ["dequantising_matmul"]
