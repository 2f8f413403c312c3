"""Mark a test as evidence for a row of the catalogue, and keep what it measured.

A test that checks a row against something nobody here wrote says so, and records the error it saw:

    @evidence("A29", oracle="transformers LlamaRotaryEmbedding", code="llmjax.nn.rope")
    def test_rope(evidence):
        ...
        evidence.record(error=max_abs, tolerance=1e-6)

When the test passes, its record is written to `.evidence/`, one file a test; `make evidence` merges the files into
`docs/evidence.md` and `docs/evidence.json`.
"""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import pytest

ROOMS = {
    "A": "Neural network parts",
    "B": "State-space models and recurrences",
    "C": "Kernels",
    "D": "Models",
    "E": "Training",
    "F": "Data",
    "G": "Adapters",
    "H": "Quantisation and distillation",
    "I": "Alignment",
    "J": "Decoding and long context",
    "K": "Reasoning and agents",
    "L": "Editing and interpretability",
    "M": "Evaluation and statistics",
    "N": "Uncertainty, safety and fairness",
    "O": "Retrieval",
    "P": "Serving and integrations",
}
ROW = re.compile(rf"[{''.join(ROOMS)}]\d{{2}}[a-z]?")


def evidence(row: str, *, oracle: str, code: str) -> pytest.MarkDecorator:
    """Mark a test as evidence for catalogue row `row`: `code` (dotted name) was compared with `oracle`."""
    if not ROW.fullmatch(row):
        raise ValueError(f"{row!r} is not the id of a catalogue row: a letter {min(ROOMS)} to {max(ROOMS)}, two digits")
    if not oracle or not re.fullmatch(r"(llmjax|pallas_kernels)(\.\w+)*", code):
        raise ValueError(
            f"evidence for {row} needs an oracle and the dotted name of our code, not {oracle!r} and {code!r}"
        )
    return pytest.mark.evidence(row, oracle=oracle, code=code)


@dataclasses.dataclass
class Recorder:
    """What the `evidence` fixture gives: the worst error of one test, as a part of its tolerance."""

    error: float | None = None
    tolerance: float = 0.0

    def record(self, error: float, tolerance: float) -> None:
        """Assert `error <= tolerance` (in the oracle's units); keep the pair that comes nearest to its tolerance."""
        error, tolerance = float(error), float(tolerance)
        assert math.isfinite(error), f"{error} is not a measured error"
        assert error >= 0, f"{error} is not a measured error"
        assert error <= tolerance, f"error {error:.3g} exceeds the tolerance {tolerance:.3g}"
        if self.error is None or _part(error, tolerance) > _part(self.error, self.tolerance):
            self.error, self.tolerance = error, tolerance


def _part(error: float, tolerance: float) -> float:
    return error / tolerance if tolerance else 0.0


def record_path(folder: Path, nodeid: str) -> Path:
    """The file in `folder` that holds the record of test `nodeid`: readable, and safe for any parameter's text."""
    name = re.sub(r"[^\w.-]+", "_", nodeid)[-80:]
    return folder / f"{name}.{hashlib.sha256(nodeid.encode()).hexdigest()[:12]}.json"


def write_record(folder: Path, nodeid: str, marks: list[pytest.Mark], recorder: Recorder) -> None:
    """Write what `recorder` saw for every row in `marks`; one file a test, so that parallel workers never share one."""
    rows = [{"row": mark.args[0], **mark.kwargs} for mark in marks]
    record = {"test": nodeid, "error": recorder.error, "tolerance": recorder.tolerance, "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(folder, nodeid)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def merge(records: list[dict]) -> dict[str, dict]:
    """Merge records into `{row: {code, oracle, error, tolerance, checks}}`, rows in the catalogue's order.

    `checks` lists every (code, oracle) of the row with the error nearest to its tolerance; the row's own `error` and
    `tolerance` are those of the worst check, its `code` and `oracle` name all of them.
    """
    checks: dict[str, dict[tuple[str, str], dict]] = {}
    for record in records:
        for mark in record["rows"]:
            row = checks.setdefault(mark["row"], {})
            key = (mark["code"], mark["oracle"])
            check = {"code": key[0], "oracle": key[1], "error": record["error"], "tolerance": record["tolerance"]}
            if key not in row or _severity(check) > _severity(row[key]):
                row[key] = check
    merged = {}
    for row in sorted(checks):
        found = [checks[row][key] for key in sorted(checks[row])]
        worst = max(found, key=_severity)
        merged[row] = {
            "code": ", ".join(dict.fromkeys(check["code"] for check in found)),
            "oracle": "; ".join(dict.fromkeys(check["oracle"] for check in found)),
            "error": worst["error"],
            "tolerance": worst["tolerance"],
            "checks": found,
        }
    return merged


def _severity(check: dict) -> tuple[float, float]:
    return _part(check["error"], check["tolerance"]), check["error"]


def page(merged: dict[str, dict]) -> str:
    """The evidence page in markdown: one table a room, one line a check."""
    lines = [
        "# Evidence",
        "",
        "Each line is a passing test that compares our code with something nobody here wrote. The error is the largest",
        "one measured, in the oracle's units, beside the tolerance the test states. Made by `make evidence`.",
        "",
        f"Rows: {len(merged)}. Checks: {sum(len(row['checks']) for row in merged.values())}.",
    ]
    for letter, room in ROOMS.items():
        rows = {row: entry for row, entry in merged.items() if row.startswith(letter)}
        if not rows:
            continue
        lines += ["", f"## {letter} {room}", "", "| row | code | oracle | error | tolerance |", "|---|---|---|---|---|"]
        for row, entry in rows.items():
            for check in entry["checks"]:
                oracle = check["oracle"].replace("|", "\\|")
                numbers = f"{check['error']:.2g} | {check['tolerance']:.2g}"
                lines.append(f"| {row} | `{check['code']}` | {oracle} | {numbers} |")
    return "\n".join(lines) + "\n"
