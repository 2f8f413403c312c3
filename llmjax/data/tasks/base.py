"""What every synthetic task offers: rows of symbols, and what a model must answer where."""

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Row(NamedTuple):
    """What a model reads, what it is to predict at each token, and which of these predictions count."""

    tokens: Int[np.ndarray, " length"]
    targets: Int[np.ndarray, " length"]
    answers: Bool[np.ndarray, " length"]


@dataclass(frozen=True)
class Task(abc.ABC):
    """Base of the tasks. The answer at a token follows from the tokens up to it, itself included."""

    @property
    @abc.abstractmethod
    def symbols(self) -> int:
        """Number of token ids."""

    @abc.abstractmethod
    def row(self, length: int, random: np.random.Generator) -> Row:
        """A row of `length` tokens, a function of the generator's draws."""

    def problems_in(self, length: int) -> Iterator[tuple[str, str]]:
        """Field and reason for each value that does not fit in rows of `length` tokens."""
        return iter(())


def next_symbol(symbols: Int[np.ndarray, " row"], asked: Bool[np.ndarray, " row"]) -> Row:
    """The row, one token shorter, in which each symbol is to be predicted from those before; it counts if `asked`."""
    return Row(symbols[:-1], symbols[1:], asked[1:])


def places(count: int, width: int, room: int, random: np.random.Generator) -> Int[np.ndarray, " count"]:
    """Where `count` pieces of `width` symbols begin that do not overlap in `room` symbols; all layouts alike likely."""
    free = room - count * (width - 1)
    return np.sort(random.permutation(free)[:count]) + (width - 1) * np.arange(count)
