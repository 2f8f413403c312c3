"""Linear attention whose state decays by a scalar or a vector, and the state-space form of Mamba-2."""

from pallas_kernels.gated_linear_attention.api import gated_linear_attention
from pallas_kernels.gated_linear_attention.quadratic import semiseparable_matrix
from pallas_kernels.gated_linear_attention.ssd import ssd

__all__ = ["gated_linear_attention", "semiseparable_matrix", "ssd"]
