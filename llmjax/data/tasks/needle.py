"""Needles in a haystack: facts hidden in a long row of noise, asked for at its end."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmjax.data.tasks.base import Row, Task, next_symbol, places


@dataclass(frozen=True)
class Needle(Task):
    """`needles` times 0 key value at random places among random hay; at the end 0 key again, the value the answer.

    After Kamradt 2023 and the key-value task of Liu et al. 2023 (2307.03172). The mark is 0, keys are 1 to K, values
    K + 1 to 2 K, hay 2 K + 1 to 2 K + `hay`. All needles are asked for, in an order of their own.
    """

    needles: int = 4
    """facts hidden"""
    keys: int = 16
    """different keys, and as many values"""
    hay: int = 32
    """different symbols of the noise"""

    @property
    def symbols(self) -> int:
        """Mark, keys, values, hay."""
        return 1 + 2 * self.keys + self.hay

    def problems(self) -> Iterator[tuple[str, str]]:
        """No needles, or more than keys; no hay."""
        if not 1 <= self.needles <= self.keys:
            yield "needles", f"must lie between 1 and keys={self.keys}"
        if self.hay < 1:
            yield "hay", "must be at least 1"

    def problems_in(self, length: int) -> Iterator[tuple[str, str]]:
        """Too short a row."""
        if length + 1 < 6 * self.needles:
            yield "needles", f"needs rows of {6 * self.needles - 1} tokens, not {length}"

    def row(self, length: int, random: np.random.Generator) -> Row:
        """Hay with needles, then the questions."""
        n = self.needles
        end = length + 1 - 3 * n
        keys = 1 + random.permutation(self.keys)[:n]
        values = 1 + self.keys + random.integers(self.keys, size=n)
        symbols = 1 + 2 * self.keys + random.integers(self.hay, size=length + 1)
        hidden, asked, order = places(n, 3, end, random), np.arange(end, length + 1, 3), random.permutation(n)
        for where, which in ((hidden, np.arange(n)), (asked, order)):
            symbols[where], symbols[where + 1], symbols[where + 2] = 0, keys[which], values[which]
        return next_symbol(symbols, np.isin(np.arange(length + 1), asked + 2))
