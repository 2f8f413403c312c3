"""Kernels on plain arrays, each behind one function with several implementations. Imports jax only."""

from pallas_kernels.attention import Mask, attention, merge_partials
from pallas_kernels.causal_convolution import causal_convolution
from pallas_kernels.context_scan import context_scan
from pallas_kernels.cross_entropy import linear_cross_entropy, linear_entropy, linear_kl, linear_token_losses
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dequantising_matmul import dequantising_matmul
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_linear_attention import gated_linear_attention, semiseparable_matrix, ssd
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.ring_attention import (
    from_layout,
    ring_attention,
    sharded_ring_attention,
    to_layout,
    ulysses_attention,
)
from pallas_kernels.selective_scan import selective_scan

__all__ = [
    "Mask",
    "attention",
    "causal_convolution",
    "context_scan",
    "decode_attention",
    "dequantising_matmul",
    "from_layout",
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_cross_entropy",
    "linear_entropy",
    "linear_kl",
    "linear_recurrence",
    "linear_token_losses",
    "merge_partials",
    "ring_attention",
    "selective_scan",
    "semiseparable_matrix",
    "sharded_ring_attention",
    "ssd",
    "to_layout",
    "ulysses_attention",
]
