"""Which adapter to take: variants of a method, what they cost, and the best of those that were measured."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS, Adapter
from llmjax.config import validate
from llmjax.nn.model import Model, flat


def variants(base: Model, adapter: Adapter, options: Mapping[str, Sequence[Any]]) -> Iterator[Adapted]:
    """The base with the adapter, for each combination of its fields' `options`, the last field running fastest.

    Raises ConfigError (one line) for a combination that does not fit the base, such as a rank above its matrices'.
    """
    for values in itertools.product(*options.values()):
        model = Adapted(base=base, adapters=(replace(adapter, **dict(zip(options, values, strict=True))),))
        validate(model)
        yield model


def trainable(model: Model) -> int:
    """Parameters that training changes."""
    return sum(x.size for path, x in flat(model.abstract()).items() if model.trains(path))


def storage(model: Adapted, tasks: int, itemsize: int = 4) -> tuple[int, int]:
    """Bytes for so many tasks of full copies, T |W|, and of one base and an adapter for each, |W| + T |D|.

    Parameters have `itemsize` bytes. An adapter is what stands in the tree for it, and what trains of the base.
    """
    leaves = flat(model.abstract())
    base = sum(x.size for path, x in leaves.items() if f"{ADAPTERS}/" not in path)
    own = sum(x.size for path, x in leaves.items() if f"{ADAPTERS}/" in path or model.trains(path))
    return tasks * base * itemsize, (base + tasks * own) * itemsize


def best(scores: Sequence[float], costs: Sequence[float], price: float = 0.0) -> int:
    """The index of the largest score - price cost; of equal ones the cheapest, then the first."""
    return min(range(len(scores)), key=lambda i: (-(scores[i] - price * costs[i]), costs[i], i))


def frontier(scores: Sequence[float], costs: Sequence[float]) -> list[int]:
    """The indices that no other one beats in score without costing more, the cheapest first (Pareto)."""
    found: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (costs[i], -scores[i], i)):
        if not found or scores[i] > scores[found[-1]]:
            found.append(i)
    return found
