"""metrics.jsonl: one JSON object a line, in step order; and the same numbers as TensorBoard events, on request."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from llmjax.config import ConfigError

FILE = "metrics.jsonl"


class MetricsLog:
    """Writes a run's metrics. A line is with the operating system when `write` returns."""

    def __init__(self, run_dir: Path, tensorboard: bool = False) -> None:
        """The log of `run_dir`; no file is touched. Raises ConfigError where TensorBoard is asked for but missing."""
        self._path = run_dir / FILE
        self._events = run_dir / "tensorboard"
        self._summary_writer = _summary_writer() if tensorboard else None
        self._writer: Any = None
        self._file: TextIO | None = None

    def open(self, step: int) -> None:
        """Drop every line after `step`, and a last line that is torn; then go on from there."""
        text = self._path.read_bytes() if self._path.exists() else b""
        kept = b"".join(line for line in text.splitlines(keepends=True) if _step(line) <= step)
        if kept != text:
            partial = self._path.with_name(f".{FILE}.partial")
            partial.write_bytes(kept)
            partial.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        if self._summary_writer is not None:
            self._writer = self._summary_writer(str(self._events), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite become null. Raises OSError where the disk refuses."""
        clean = {name: _finite(value) for name, value in line.items()}
        if self._file is None:
            raise ValueError("the log is not open")
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in clean.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, clean["step"])

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; a torn last line is left out, and a missing file has none."""
    return list(_lines(Path(run_dir) / FILE))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if _step(line) < math.inf:
                yield json.loads(line)


def _step(line: bytes) -> float:
    """The step of a line; infinity where the line is torn."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError("train.tensorboard=True needs tensorboardX: pip install 'llmjax[track]'") from None
    return SummaryWriter
