"""Where every catalogue row is: its file, the experiments that use it, its oracle. Writes docs/rows.md.

    python -m scripts.rows

Rows, files and oracles come from docs/evidence.json (`make evidence`), experiments from the files in experiments/.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax.cli.commands.list import experiments
from llmjax.experiment import load_experiment

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Rows

Each catalogue row with a test that has an outside oracle: the file that computes it, the experiments whose config holds
a component of that file, and what it was compared with. Errors are in [evidence.md](evidence.md). Functions that no
config names (kernels, metrics, conversions) have no experiment of their own. Made by `python -m scripts.rows`.

| row | file | experiments | oracle |
|---|---|---|---|
"""


def main() -> None:
    """Write the page."""
    (ROOT / "docs" / "rows.md").write_text(page(ROOT))


def page(root: Path) -> str:
    """The page as markdown."""
    users = used_by(root / "experiments")
    lines = []
    for row, entry in json.loads((root / "docs" / "evidence.json").read_text()).items():
        files = list(dict.fromkeys(file_of(root, check["code"]) for check in entry["checks"]))
        named = sorted({spec for file in files for spec in users.get(file, ())})
        shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        oracle = entry["oracle"].replace("|", "\\|")
        lines.append(f"| {row} | {', '.join(f'`{file}`' for file in files)} | {shown} | {oracle} |\n")
    return HEAD + "".join(lines)


def file_of(root: Path, code: str) -> str:
    """The module of a dotted name, as a path from the root: the longest part of the name that is a file."""
    parts = code.split(".")
    for end in range(len(parts), 0, -1):
        stem = root.joinpath(*parts[:end])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.exists():
                return str(path.relative_to(root))
    raise ValueError(f"{code} is in no file")


def used_by(folder: Path) -> dict[str, set[str]]:
    """For each source file the experiments that hold an instance of one of its classes."""
    found: dict[str, set[str]] = defaultdict(set)
    for spec in experiments(folder):
        short = str(Path(spec).relative_to(folder)).replace(".py", "")
        for node in nodes(load_experiment(spec)):
            found[type(node).__module__.replace(".", "/") + ".py"].add(short)
    return found


def nodes(value: Any) -> Iterator[Any]:
    """Every config object of a tree."""
    if isinstance(value, tuple):
        for entry in value:
            yield from nodes(entry)
    elif dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from nodes(getattr(value, field.name))


if __name__ == "__main__":
    main()
