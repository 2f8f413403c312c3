"""Learning-rate schedules: plain functions of the step, evaluated on the host.

The compiled training step receives the learning rate as an argument, so a schedule is never traced and changing it
never recompiles. Every schedule starts with a linear warmup from 0 at step 0 to the peak at step `warmup`; the values
agree with `optax.warmup_cosine_decay_schedule` and its kin. Steps count optimizer updates, after gradient
accumulation, so a warmup given as a fraction is a fraction of updates.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule(ABC):
    """Base of all schedules: a linear warmup to the peak, then `after`."""

    learning_rate: float = 3e-4
    """Peak learning rate, reached at the end of the warmup."""
    warmup: int | float = 0
    """Length of the linear warmup: steps when an int, a fraction of the run in [0, 1) when a float."""

    def value(self, step: int, total_steps: int) -> float:
        """Learning rate of update `step` (from 0) in a run of `total_steps`; after the run it stays at the floor."""
        warmup = self.warmup_steps(total_steps)
        if step < warmup:
            return self.learning_rate * step / warmup
        return self.learning_rate * self.after(step - warmup, max(total_steps - warmup, 1), warmup)

    def warmup_steps(self, total_steps: int) -> int:
        """Length of the warmup in steps; a fraction is rounded to the nearest step."""
        if isinstance(self.warmup, float):
            return round(self.warmup * total_steps)
        return self.warmup

    @abstractmethod
    def after(self, step: int, steps: int, warmup: int) -> float:
        """Multiple of the peak at `step` of the `steps` that follow `warmup` steps of warmup."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if not self.learning_rate > 0:
            yield "learning_rate", "is not positive: use for example 3e-4"
        if isinstance(self.warmup, float) and not 0 <= self.warmup < 1:
            yield "warmup", "is a float and so a fraction of the run: use one in [0, 1), or an int for steps"
        if self.warmup < 0:
            yield "warmup", "is negative: use 0 for none"


@dataclass(frozen=True)
class Constant(Schedule):
    """Warmup, then the peak for the rest of the run."""

    def after(self, step: int, steps: int, warmup: int) -> float:
        """Multiple of the peak: 1."""
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """Warmup, then a straight line to the floor at the last step."""

    floor: float = 0.0
    """Final learning rate as a fraction of the peak."""

    def after(self, step: int, steps: int, warmup: int) -> float:
        """Multiple of the peak: 1 - (1 - floor) t / T."""
        return _interpolate(1 - _progress(step, steps), self.floor)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from _floor_problems(self.floor)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Warmup, then half a cosine to the floor (Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts)."""

    floor: float = 0.1
    """Final learning rate as a fraction of the peak; 0.1 as in GPT-3 and LLaMA."""
    end: int | float = 1.0
    """Where the floor is reached and kept: a step when an int, a fraction of the run in (0, 1] when a float."""

    def after(self, step: int, steps: int, warmup: int) -> float:
        """Multiple of the peak: floor + (1 - floor) (1 + cos(pi t / T)) / 2."""
        end = round(self.end * (steps + warmup)) if isinstance(self.end, float) else self.end
        return _interpolate((1 + math.cos(math.pi * _progress(step, max(end - warmup, 1)))) / 2, self.floor)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from _floor_problems(self.floor)
        if not self.end > 0 or (isinstance(self.end, float) and self.end > 1):
            yield "end", "is neither a step above 0 (an int) nor a fraction of the run in (0, 1] (a float)"


@dataclass(frozen=True)
class WSD(Schedule):
    """Warmup, stable at the peak, then decay over the last part of the run (Hu 2024, arXiv:2404.06395).

    The shape `sqrt` is 1 - sqrt(t / T) of Hägele 2024 (arXiv:2405.18392), which they found best.
    """

    decay: float = 0.2
    """Length of the final decay as a fraction of the run in (0, 1]."""
    shape: Literal["linear", "cosine", "sqrt"] = "sqrt"
    """Form of the final decay."""
    floor: float = 0.0
    """Final learning rate as a fraction of the peak."""

    def after(self, step: int, steps: int, warmup: int) -> float:
        """Multiple of the peak: 1 while stable, then the decay's shape."""
        decay = max(min(round(self.decay * (steps + warmup)), steps), 1)
        progress = _progress(step - (steps - decay), decay)
        remaining = {
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "sqrt": 1 - math.sqrt(progress),
        }[self.shape]
        return _interpolate(remaining, self.floor)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from _floor_problems(self.floor)
        if not 0 < self.decay <= 1:
            yield "decay", "is not in (0, 1]: use for example 0.2"


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """Warmup to the peak at step w, then peak * sqrt(w / step) (Vaswani 2017, arXiv:1706.03762, section 5.3).

    It does not depend on the length of the run. Without warmup the reference step w is 1.
    """

    warmup: int | float = 1000
    """Length of the linear warmup: steps when an int, a fraction of the run in [0, 1) when a float."""

    def after(self, step: int, steps: int, warmup: int) -> float:
        """Multiple of the peak: sqrt(w / step), counting the step from the start of the run."""
        reference = max(warmup, 1)
        return math.sqrt(reference / max(step + warmup, reference))


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)


def _interpolate(remaining: float, floor: float) -> float:
    return floor + (1 - floor) * remaining


def _floor_problems(floor: float) -> Iterator[tuple[str, str]]:
    if not 0 <= floor <= 1:
        yield "floor", "is not in [0, 1]: it is a fraction of the peak learning rate"
