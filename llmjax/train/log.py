"""metrics.jsonl: one JSON object a line, in step order; and the same numbers as TensorBoard events, on request."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError

FILE = "metrics.jsonl"


class MetricsLog:
    """Writes a run's metrics. A line is on its way to the disk when `write` returns; `sync` waits until it is there."""

    def __init__(self, run_dir: Path, tensorboard: bool = False) -> None:
        """Open the log of `run_dir`. Raises ConfigError where TensorBoard events are asked for but not to be had."""
        self._dir = run_dir
        self._tensorboard = tensorboard
        self._writer: Any = None
        if tensorboard:
            _summary_writer()
        self._file = (run_dir / FILE).open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drop every line after `step`, and a last line that is torn."""
        text = (self._dir / FILE).read_bytes()
        kept = b"".join(line for line in text.splitlines(keepends=True) if _step(line) <= step)
        if kept != text:
            self._file.close()
            partial = self._dir / f".{FILE}.partial"
            partial.write_bytes(kept)
            partial.replace(self._dir / FILE)
            self._file = (self._dir / FILE).open("a", encoding="utf-8")
        if self._tensorboard:
            self._writer = _summary_writer()(str(self._dir / "tensorboard"), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite become null. Raises OSError where the disk refuses."""
        clean = {name: _finite(value) for name, value in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in clean.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, clean["step"])

    def close(self) -> None:
        """Close the files."""
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
