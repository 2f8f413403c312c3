"""The logged history of a run: `metrics.jsonl` read back as one series a metric."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from llmjax.config import InputError


class Series(NamedTuple):
    """The values of one metric in the order of their steps."""

    steps: list[int]
    values: list[float]


def read(run_dir: str | Path) -> dict[str, Series]:
    """Every numeric metric of `run_dir/metrics.jsonl` by name; of a step logged twice the later line counts.

    A last line that a killed process left unfinished is passed over. Raises InputError where there is no such file, or
    another line is not JSON.
    """
    path = Path(run_dir) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: train first, or name another run directory") from None
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: not JSON: {error}") from None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault(name, {})[row["step"]] = float(value)
    return {name: Series(*map(list, zip(*sorted(points.items())))) for name, points in found.items()}


def finite(series: Series) -> Series:
    """The points that can be drawn."""
    points = [(step, value) for step, value in zip(*series) if math.isfinite(value)]
    return Series([step for step, _ in points], [value for _, value in points])
