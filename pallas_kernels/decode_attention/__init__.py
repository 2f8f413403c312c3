"""Attention of one or a few queries per sequence against a ragged, paged cache."""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.cache import Config

__all__ = ["Config", "decode_attention"]
