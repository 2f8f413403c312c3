"""`llmjax diff A B`: where two experiments or runs differ."""

from argparse import Namespace
from typing import Any

from llmjax.config import diff, to_dict
from llmjax.experiment import load_experiment


def run(arguments: Namespace) -> dict[str, Any]:
    """Print a line for each difference; returns them as `{"differences": [{path, a, b}]}`."""
    found = diff(load_experiment(arguments.a), load_experiment(arguments.b))
    for path, a, b in found:
        print(f"{path}: {a} -> {b}")
    if not found:
        print("no difference")
    return {"differences": [{"path": path, "a": to_dict(a), "b": to_dict(b)} for path, a, b in found]}
