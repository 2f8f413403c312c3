"""`llmjax plot RUN_DIR...`: the curves of runs as PNG files."""

from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from llmjax.config import InputError
from llmjax.report import history, plots


def run(arguments: Namespace) -> dict[str, Any]:
    """Draw and print the files; returns `{"files": [...]}`."""
    runs = {label: history.read(path) for label, path in labels(arguments.run_dirs).items()}
    default = Path(arguments.run_dirs[0]) / "plots" if len(runs) == 1 else Path("plots")
    files = plots.save(runs, arguments.out or default)
    if not files:
        raise InputError(f"{', '.join(arguments.run_dirs)}: nothing was logged yet that could be drawn")
    for file in files:
        print(file)
    return {"files": files}


def labels(run_dirs: list[str]) -> dict[str, str]:
    """Each run under its directory's name, or its whole path where two have the same name."""
    names = {path: Path(path).resolve().name for path in run_dirs}
    count = Counter(names.values())
    return {path if count[name] > 1 else name: path for path, name in names.items()}
