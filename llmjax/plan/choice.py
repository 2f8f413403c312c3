"""Choosing among settings: the most rows that fit, those that nothing beats, the best that is allowed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def max_rows(memory: float, fixed: float, row: float) -> int:
    """Rows of a batch that fit: floor((memory - fixed) / row), and none where what is fixed does not fit itself."""
    return max(int((memory - fixed) // row), 0)


def pareto(points: Mapping[str, Sequence[float]]) -> list[str]:
    """Names of the points that no other is at least as good as in everything and better in something; more is better.

    Give what should be small with its sign turned.
    """

    def beaten(mine: Sequence[float]) -> bool:
        return any(
            all(a >= b for a, b in zip(other, mine, strict=True)) and tuple(other) != tuple(mine)
            for other in points.values()
        )

    return [name for name, point in points.items() if not beaten(point)]


def cheapest(settings: Iterable[T], cost: Callable[[T], float], allowed: Callable[[T], bool]) -> T:
    """The setting of least cost among those allowed; raises ValueError where none is."""
    return min(filter(allowed, settings), key=cost)
