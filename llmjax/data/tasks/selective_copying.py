"""Selective copying: letters scattered among blanks, to be repeated without these."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmjax.data.tasks.base import Row, Task, places


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """`count` letters among blanks, then as many markers: at these the letters are the answers, in their order.

    Gu and Dao 2023 (2312.00752), section 3.1. Blank is 0, marker 1, letters are 2 to `letters` + 1. What is to be
    remembered is known by the token, not by its place, so that a convolution alone cannot do it.
    """

    count: int = 8
    """letters to remember (the paper: 16)"""
    letters: int = 16
    """different letters (the paper: 16)"""

    @property
    def symbols(self) -> int:
        """Blank, marker, letters."""
        return 2 + self.letters

    def problems(self) -> Iterator[tuple[str, str]]:
        """Nothing to remember or to tell apart."""
        if self.count < 1:
            yield "count", "must be at least 1"
        if self.letters < 2:
            yield "letters", "must be at least 2"

    def problems_in(self, length: int) -> Iterator[tuple[str, str]]:
        """Too short a row."""
        if length < 2 * self.count:
            yield "count", f"needs rows of {2 * self.count} tokens, not {length}"

    def row(self, length: int, random: np.random.Generator) -> Row:
        """Letters among blanks, then markers."""
        memory = length - self.count
        letters = 2 + random.integers(self.letters, size=self.count)
        tokens, targets = np.zeros(length, np.int64), np.zeros(length, np.int64)
        tokens[places(self.count, 1, memory, random)], tokens[memory:] = letters, 1
        targets[memory:] = letters
        return Row(tokens, targets, np.arange(length) >= memory)
