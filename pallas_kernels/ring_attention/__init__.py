"""Attention over a sequence that is split over devices."""

from pallas_kernels.ring_attention.api import ring_attention, sharded_ring_attention
from pallas_kernels.ring_attention.either import context_attention
from pallas_kernels.ring_attention.layout import from_layout, positions_of, to_layout
from pallas_kernels.ring_attention.ulysses import Choice, choose, ulysses_attention

__all__ = [
    "Choice",
    "choose",
    "context_attention",
    "from_layout",
    "positions_of",
    "ring_attention",
    "sharded_ring_attention",
    "to_layout",
    "ulysses_attention",
]
