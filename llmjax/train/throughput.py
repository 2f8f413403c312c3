"""Model FLOPs utilisation: what a run computes against what its devices could (PaLM, 2204.02311, appendix B)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bfloat16 FLOP/s a chip, from the vendors' data sheets, by a part of the device kind."""


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Dense bfloat16 FLOP/s of all devices together; None where a device's peak is not known (CPUs)."""
    total = 0.0
    for device in devices:
        names = [name for name in PEAK_FLOPS if name in device.device_kind]
        if not names:
            return None
        # "TPU v5" is a part of "TPU v5 lite": the longest name is the chip's own.
        total += PEAK_FLOPS[max(names, key=len)]
    return total


def mfu(tokens_per_second: float, flops_per_token: float, devices: Sequence[jax.Device]) -> float | None:
    """tokens/s * model FLOPs per token / peak FLOP/s; None where the peak is not known."""
    peak = peak_flops(devices)
    return None if peak is None else tokens_per_second * flops_per_token / peak


@dataclass
class Rate:
    """A stopwatch for tokens: it runs from `start` and is read by `lap`."""

    tokens: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds spent waiting for data."""
    _since: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Zero before any time has passed."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def start(self) -> None:
        """Run from now on; what passed since the last lap does not count."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the start or the last lap, now counted; zero where it was never started."""
        now = time.perf_counter()
        passed = 0.0 if self._since is None else now - self._since
        self._since = self._since and now
        self.seconds += passed
        return passed

    def add(self, other: "Rate") -> None:
        """Add what another stopwatch has counted."""
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.waited += other.waited
