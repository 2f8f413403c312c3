"""The time of a step from what its program computes, moves and sends (Williams et al. 2009, Roofline).

seconds = sum over instructions of max(FLOPs / reached FLOP/s, bytes / reached bytes/s) + collectives not hidden.
An instruction is bound by one or the other; instructions follow each other. A synchronous collective adds its whole
time; asynchronous ones hide behind what their computation runs between their start and their end.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmjax.plan.chips import HBM_EFFICIENCY, Chip
from llmjax.plan.collectives import Collective
from llmjax.plan.work import Work


@dataclass(frozen=True)
class Terms:
    """Seconds of one step and what they are made of."""

    matmul: float
    """Instructions bound by matrix products."""
    kernels: float
    """Attention and scan kernels."""
    hbm: float
    """Instructions bound by HBM."""
    collectives: float
    """All collectives, hidden or not."""
    exposed: float
    """Collectives that nothing hides."""

    @property
    def step(self) -> float:
        """The whole step."""
        return self.matmul + self.kernels + self.hbm + self.exposed


def terms(
    chip: Chip,
    works: Iterable[Work],
    sent: Iterable[tuple[Collective, float]],
    hideable: Callable[[str], set[str]],
) -> Terms:
    """The terms of a program on one chip; `sent` pairs each collective with the bytes a second of its group.

    `hideable(computation)` names the instructions there that run while a collective is under way.
    """
    seconds = {"matmul": 0.0, "kernels": 0.0, "hbm": 0.0}
    cover: dict[str, float] = defaultdict(float)
    for one in works:
        computing, moving = compute_seconds(chip, one), one.nbytes / (chip.hbm_bandwidth * HBM_EFFICIENCY)
        kind = "hbm" if moving > computing else "kernels" if one.kernel else "matmul"
        seconds[kind] += one.times * max(computing, moving)
        if one.name in hideable(one.computation):
            cover[one.computation] += one.times * max(computing, moving)
    total, exposed = 0.0, 0.0
    hidden: dict[str, float] = defaultdict(float)
    for collective, speed in sent:
        needed = collective.times * collective.nbytes / speed
        total += needed
        if collective.asynchronous:
            hidden[collective.computation] += needed
        else:
            exposed += needed
    exposed += sum(max(needed - cover[name], 0.0) for name, needed in hidden.items())
    return Terms(**seconds, collectives=total, exposed=exposed)


def compute_seconds(chip: Chip, one: Work) -> float:
    """Time of the matrix products of one execution."""
    return one.flops / (chip.flops * (chip.kernel_efficiency if one.kernel else chip.matmul_efficiency))
