"""Induction: what followed a trigger before follows it again."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmjax.data.tasks.base import Row, Task, next_symbol


@dataclass(frozen=True)
class Induction(Task):
    """... A b ... A b: a letter drawn for the row follows every trigger, and is the answer from the second one on.

    Olsson et al. 2022 (2209.11895); with one trigger as in Dao et al. 2022 (2212.14052). The trigger A is 0, letters
    are 1 to `letters`. Each `letters` + 1 symbols hold one trigger, and b stands nowhere else: all letters are alike
    frequent, so that who counts them learns nothing, in rows of any length.
    """

    letters: int = 15
    """different letters"""

    @property
    def symbols(self) -> int:
        """Trigger and letters."""
        return 1 + self.letters

    def problems(self) -> Iterator[tuple[str, str]]:
        """Nothing to tell apart."""
        if self.letters < 2:
            yield "letters", "must be at least 2"

    def problems_in(self, length: int) -> Iterator[tuple[str, str]]:
        """A row without a second trigger."""
        if length + 1 < 2 * self.symbols:
            yield "letters", f"needs rows of {2 * self.symbols - 1} tokens, not {length}"

    def row(self, length: int, random: np.random.Generator) -> Row:
        """Random other letters, and in each whole piece of `letters` + 1 symbols a trigger with the row's letter."""
        letter = random.integers(self.letters)
        others = np.delete(1 + np.arange(self.letters), letter)
        symbols, asked = others[random.integers(len(others), size=length + 1)], np.zeros(length + 1, bool)
        begin = np.arange(0, length + 2 - self.symbols, self.symbols)
        triggers = begin + random.integers(self.symbols - 1, size=len(begin))
        symbols[triggers], symbols[triggers + 1] = 0, 1 + letter
        asked[triggers[1:] + 1] = True
        return next_symbol(symbols, asked)
