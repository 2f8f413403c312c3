"""The logged history of a run: `metrics.jsonl` read back as one series a metric."""

import math
from pathlib import Path
from typing import NamedTuple

from llmjax.config import InputError
from llmjax.train.log import FILE, read_metrics


class Series(NamedTuple):
    """The values of one metric in the order of their steps."""

    steps: list[int]
    values: list[float]


def read(run_dir: str | Path) -> dict[str, Series]:
    """Every numeric metric of a run by name; of a step logged twice the later line counts.

    Raises InputError where there is no `metrics.jsonl`.
    """
    if not (Path(run_dir) / FILE).is_file():
        raise InputError(f"{run_dir} holds no {FILE}: train first, or name another run directory")
    found: dict[str, dict[int, float]] = {}
    for row in read_metrics(run_dir):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[row["step"]] = float(value)
    return {name: Series(*map(list, zip(*sorted(points.items())))) for name, points in found.items()}


def finite(series: Series) -> Series:
    """The points that can be drawn."""
    points = [(step, value) for step, value in zip(*series) if math.isfinite(value)]
    return Series([step for step, _ in points], [value for _, value in points])
