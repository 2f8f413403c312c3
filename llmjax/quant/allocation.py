"""Bits a layer: which format each matrix gets, so that the whole error is least and the bytes stay within a budget.

    minimise sum_l error_l(c_l)   subject to   sum_l bytes_l(c_l) <= budget

Solved exactly, by adding layer after layer to the set of (bytes, error) pairs that no other beats in both. Layers of
one shape cost the same, so the set stays small.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from llmjax.config import InputError

Choice = TypeVar("Choice")


class Cost(NamedTuple):
    """What one choice costs one layer."""

    bytes: int
    error: float


def allocate(costs: Mapping[str, Mapping[Choice, Cost]], budget: int) -> dict[str, Choice]:
    """The choice for every layer; raises InputError where even the smallest choices exceed the budget."""
    best: list[tuple[int, float, tuple[Choice, ...]]] = [(0, 0.0, ())]
    for options in costs.values():
        sums = [
            (size + cost.bytes, error + cost.error, (*chosen, choice))
            for size, error, chosen in best
            for choice, cost in options.items()
            if size + cost.bytes <= budget
        ]
        best = unbeaten(sums)
    if not best:
        least = sum(min(cost.bytes for cost in options.values()) for options in costs.values())
        raise InputError(f"a budget of {budget} bytes is below the {least} that the smallest formats need")
    return dict(zip(costs, best[-1][2], strict=True))


def unbeaten(sums: list[tuple[int, float, tuple[Choice, ...]]]) -> list[tuple[int, float, tuple[Choice, ...]]]:
    """The pairs that no smaller one equals in error, by rising size and falling error."""
    found: list[tuple[int, float, tuple[Choice, ...]]] = []
    for candidate in sorted(sums, key=lambda item: item[:2]):
        if not found or candidate[1] < found[-1][1]:
            found.append(candidate)
    return found
