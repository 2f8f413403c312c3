"""Multi-query associative recall: pairs of key and value, then keys whose values are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmjax.data.tasks.base import Row, Task, next_symbol


@dataclass(frozen=True)
class Recall(Task):
    """k1 v1 ... kn vn, then each key once more at a random place, its value the answer. Arora et al. 2023 (2312.04927).

    Symbol 0 fills the gaps; keys are 1 to K, values K + 1 to 2 K. A fixed state must hold all `pairs`; attention looks
    them up.
    """

    pairs: int = 8
    """associations to remember"""
    keys: int = 32
    """different keys, and as many values"""

    @property
    def symbols(self) -> int:
        """Gap, keys, values."""
        return 1 + 2 * self.keys

    def problems(self) -> Iterator[tuple[str, str]]:
        """No pairs, or more than keys."""
        if not 1 <= self.pairs <= self.keys:
            yield "pairs", f"must lie between 1 and keys={self.keys}"

    def problems_in(self, length: int) -> Iterator[tuple[str, str]]:
        """Too short a row."""
        if length + 1 < 4 * self.pairs:
            yield "pairs", f"needs rows of {4 * self.pairs - 1} tokens, not {length}"

    def row(self, length: int, random: np.random.Generator) -> Row:
        """Pairs at the beginning, questions at random even places after them."""
        n = self.pairs
        keys = 1 + random.permutation(self.keys)[:n]
        values = 1 + self.keys + random.integers(self.keys, size=n)
        symbols, asked = np.zeros(length + 1, np.int64), np.zeros(length + 1, bool)
        symbols[0 : 2 * n : 2], symbols[1 : 2 * n : 2] = keys, values
        questions = 2 * n + 2 * random.permutation((length + 1 - 2 * n) // 2)[:n]
        symbols[questions], symbols[questions + 1] = keys, values
        asked[questions + 1] = True
        return next_symbol(symbols, asked)
