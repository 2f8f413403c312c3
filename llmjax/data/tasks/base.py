"""What every synthetic task offers: rows of symbols, and which of them are answers."""

import abc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Task(abc.ABC):
    """Base of the tasks."""

    @property
    @abc.abstractmethod
    def symbols(self) -> int:
        """Number of token ids."""

    @abc.abstractmethod
    def row(self, length: int, random: np.random.Generator) -> tuple[Int[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
        """`length + 1` symbols, and which of them are answers: those that a model must predict from what precedes."""

    def problems_in(self, length: int) -> Iterator[tuple[str, str]]:
        """Field and reason for each value that does not fit in rows of `length` tokens."""
        return iter(())
