"""Rates of the chips that a plan can be made for, and the share of them that programs reach.

Peaks are the makers' data sheets (Cloud TPU system architecture pages; NVIDIA A100, H100, H200 and B200 data sheets),
for one jax device, which is half a chip of v4 and of tpu7x. `matmul_efficiency` of v5p and v6e is fitted to MaxText's
published rows (tests/plan/test_published.py); v4 and v5e, whose matrix units are of v5p's size, and tpu7x, whose are
of v6e's, take theirs over; those of the GPUs are assumptions. `kernel_efficiency` of v5p, v6e and tpu7x is what tokamax
publishes for its tuned causal attention of head_dim 128 (between its 4k and 16k rows: 222 and 343, 174 and 276, 203 and
307 TFLOP/s; matrix units that are 256 wide stand half idle there), of v4 and v5e v5p's, of GPUs FlashAttention-3's
(Shah et al. 2024, 2407.08608).
"""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30

HBM_EFFICIENCY = 0.8
"""Share of the HBM's data sheet bandwidth that fused elementwise kernels reach; assumed for every chip."""
LINK_EFFICIENCY = 0.9
"""Share of a link's data sheet bandwidth: 90 of 100 GB/s on v5p, v6e (Austin et al. 2025, How to Scale Your Model)."""


@dataclass(frozen=True)
class Chip:
    """One kind of jax device and the network between its kind."""

    name: str
    flops: float
    """Dense bfloat16 peak, FLOP/s."""
    hbm_bytes: int
    """Memory that a program may use: what the compiler allows (TPU), nine tenths of the data sheet's (GPU)."""
    hbm_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second in one direction: of one link of the torus (TPU), of all NVLinks of a GPU."""
    matmul_efficiency: float
    """Share of the peak that large matrix products reach."""
    kernel_efficiency: float
    """Share of the peak that attention kernels reach."""
    wraps: int = 0
    """TPU: an axis of the torus is closed to a ring where its length is a multiple of this."""
    host_bandwidth: float = 0.0
    """GPU: bytes a second, in one direction, of a GPU's network card."""

    @property
    def platform(self) -> Literal["tpu", "gpu"]:
        """Whose compiler makes its programs."""
        return "tpu" if self.wraps else "gpu"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 137.5e12, int(15.25 * GIB), 0.614e12, 25e9, 0.85, 0.6, wraps=4),
        Chip("v5e", 197e12, int(15.75 * GIB), 0.819e12, 50e9, 0.85, 0.6, wraps=16),
        Chip("v5p", 459e12, int(95.74 * GIB), 2.765e12, 100e9, 0.85, 0.6, wraps=4),
        Chip("v6e", 918e12, int(31.25 * GIB), 1.638e12, 100e9, 0.70, 0.25, wraps=16),
        Chip("tpu7x", 1153e12, int(94.75 * GIB), 3.69e12, 50e9, 0.70, 0.22, wraps=4),
        Chip("a100", 312e12, int(0.9 * 80e9), 2.039e12, 300e9, 0.7, 0.5, host_bandwidth=25e9),
        Chip("h100", 989e12, int(0.9 * 80e9), 3.35e12, 450e9, 0.65, 0.55, host_bandwidth=50e9),
        Chip("h200", 989e12, int(0.9 * 141e9), 4.8e12, 450e9, 0.65, 0.55, host_bandwidth=50e9),
        Chip("b200", 2250e12, int(0.9 * 180e9), 7.7e12, 900e9, 0.65, 0.55, host_bandwidth=50e9),
    )
}
