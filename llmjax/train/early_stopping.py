"""Early stopping on a validation loss: a config and pure functions over a small state of plain numbers.

Two readings of "patience p" are in use and both are here. `best` counts checks in a row that did not improve on the
best value by more than `min_delta` (Prechelt 1998). `rises` counts consecutive increases, each over the check before
it: p increases need p + 1 values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple


class EarlyStoppingState(NamedTuple):
    """What has been seen so far; plain numbers, so that it goes into a checkpoint as JSON."""

    best: float = math.inf
    """Lowest value so far."""
    best_step: int = -1
    """Step of the lowest value, -1 before the first finite one."""
    previous: float = math.inf
    """Value of the last check."""
    strikes: int = 0
    """Checks in a row that counted against going on."""


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when a loss (lower is better) has not got better for `patience` checks."""

    patience: int = 3
    """Number of checks in a row without improvement after which training stops."""
    min_delta: float = 0.0
    """A value counts as better (with `rises`, as worse) only if it differs by more than this, in the loss's unit."""
    mode: Literal["best", "rises"] = "best"
    """`best`: a check without a new best value is a strike; `rises`: an increase over the last check is."""

    def init(self) -> EarlyStoppingState:
        """State before the first check."""
        return EarlyStoppingState()

    def update(self, state: EarlyStoppingState, step: int, value: float) -> EarlyStoppingState:
        """State after the check at `step` measured `value`; a NaN or infinite value is a strike and never the best."""
        finite = math.isfinite(value)
        improved = finite and value < state.best - self.min_delta
        rose = not finite or value > state.previous + self.min_delta
        strike = rose if self.mode == "rises" else not improved
        better = finite and value < state.best if self.mode == "rises" else improved
        return EarlyStoppingState(
            best=value if better else state.best,
            best_step=step if better else state.best_step,
            previous=value if finite else state.previous,
            strikes=state.strikes + 1 if strike else 0,
        )

    def should_stop(self, state: EarlyStoppingState) -> bool:
        """Whether patience has run out."""
        return state.strikes >= self.patience

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if self.patience < 1:
            yield "patience", "is below 1: use at least 1"
        if self.min_delta < 0:
            yield "min_delta", "is negative: use 0 to count every improvement"
