"""Run every test that has an outside oracle; write docs/evidence.md and docs/evidence.json from what they measured.

    make evidence

The parity and hardware suites run where their environments have been made (`make setup-parity setup-hardware`).
Where one has not, the records that its last run left in `.evidence/` stay, as long as their tests still stand in
the repository. If any test fails, nothing is written.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from tests.evidence import merge, page

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS_COLLECTED = 5
OWN_ENVIRONMENT = ("parity", "hardware")


def main() -> int:
    """Run the suites, merge their records and write the two pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for suite in OWN_ENVIRONMENT:
        parser.add_argument(f"--{suite}", type=Path, required=True, help=f"environment of the {suite} suite")
    parser.add_argument("--merge-only", action="store_true", help="run nothing: merge the records that are there")
    arguments = parser.parse_args()
    if not arguments.merge_only:
        others = " and ".join(f"not {suite}" for suite in OWN_ENVIRONMENT)
        suites = [(Path(sys.executable), others)]
        for suite in OWN_ENVIRONMENT:
            python = ROOT / getattr(arguments, suite) / "bin" / "python"
            if python.exists():
                suites.append((python, suite))
            else:
                print(f"{suite}: no environment yet (make setup-{suite}); keeping the records of its last run")
        for python, marker in suites:
            if not _run(python, f"evidence and {marker}"):
                print("a test failed: the evidence pages are left as they were", file=sys.stderr)
                return 1
    records = _records(ROOT / ".evidence")
    merged = merge(records)
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "evidence.json").write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    (docs / "evidence.md").write_text(page(merged))
    print(f"{len(merged)} rows from {len(records)} tests: docs/evidence.md, docs/evidence.json")
    return 0


def _run(python: Path, expression: str) -> bool:
    """Run the tests that `expression` selects; True if none failed (no tests at all is no failure)."""
    command = [str(python), "-m", "pytest", "-m", expression, "-q"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode in (0, NO_TESTS_COLLECTED)


def _records(folder: Path) -> list[dict]:
    """The records in `folder` whose tests still exist; the others are removed, so that no row outlives its test."""
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if _marked(record["test"], record["rows"]):
            records.append(record)
        else:
            path.unlink()
    return records


def _marked(nodeid: str, rows: list[dict]) -> bool:
    """Whether the test `nodeid` still stands and its file still names every row of `rows`."""
    name, *parts = nodeid.split("[")[0].split("::")
    source = ROOT / name
    if not source.exists():
        return False
    text = source.read_text()
    if not all(re.search(rf'"{row["row"]}\b', text) for row in rows):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == parts[-1] for node in ast.walk(ast.parse(text)))


if __name__ == "__main__":
    sys.exit(main())
