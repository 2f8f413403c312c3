"""Copying: a text of random letters, then the same once more."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmjax.data.tasks.base import Row, Task, next_symbol


@dataclass(frozen=True)
class Copying(Task):
    """x1 ... xn 0 x1 ... xn, the second time the answers, n = length / 2. Jelassi et al. 2024 (2402.01032).

    Letters are 1 to `letters`, 0 separates. The distance to what is copied is the same all along a row: a convolution
    as long as the row can do it, too.
    """

    letters: int = 32
    """different letters"""

    @property
    def symbols(self) -> int:
        """Separator and letters."""
        return 1 + self.letters

    def problems(self) -> Iterator[tuple[str, str]]:
        """Nothing to tell apart."""
        if self.letters < 2:
            yield "letters", "must be at least 2"

    def problems_in(self, length: int) -> Iterator[tuple[str, str]]:
        """No room for a letter and its copy."""
        if length < 2:
            yield "letters", f"needs rows of 2 tokens, not {length}"

    def row(self, length: int, random: np.random.Generator) -> Row:
        """The text, the separator and the text; a row of odd length begins with one more separator."""
        text = 1 + random.integers(self.letters, size=length // 2)
        symbols = np.concatenate([np.zeros(length % 2, np.int64), text, [0], text])
        return next_symbol(symbols, np.arange(length + 1) > length - length // 2)
