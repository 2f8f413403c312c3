"""metrics.jsonl survives torn lines and forgets what comes after a restored step; TensorBoard gets the same numbers."""

import json
import math
import sys
from types import ModuleType

import pytest

from llmjax.config import ConfigError
from llmjax.train.log import FILE, MetricsLog, read_metrics
from tests.evidence import evidence


def written(folder, steps):
    """A log with a line at each step."""
    log = MetricsLog(folder)
    log.open(0)
    for step in steps:
        log.write({"step": step, "loss": 1.0 / 3.0 * step})
    log.close()


def test_lines_come_back_exactly(tmp_path):
    written(tmp_path, [1, 2, 3])
    assert read_metrics(tmp_path) == [{"step": n, "loss": 1.0 / 3.0 * n} for n in (1, 2, 3)]


def test_what_is_not_finite_is_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.open(0)
    log.write({"step": 1, "loss": math.nan, "nll": math.inf, "mfu": None})
    log.close()
    line = (tmp_path / FILE).read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "nll": None, "mfu": None}


@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "lo', b'{"step": 4}', b"\x00\x00\n", b"[]\n"])
def test_a_torn_last_line_is_no_line(tmp_path, torn):
    written(tmp_path, [1, 2, 3])
    with (tmp_path / FILE).open("ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    log = MetricsLog(tmp_path)
    log.open(3)
    log.write({"step": 4})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / FILE).read_text().splitlines()] == [1, 2, 3, 4]


def test_rewinding_drops_later_lines_only(tmp_path):
    written(tmp_path, [2, 4, 6, 8])
    before = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    log = MetricsLog(tmp_path)
    log.open(5)
    log.close()
    assert (tmp_path / FILE).read_bytes() == b"".join(before[:2])


def test_no_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


@evidence("E57", oracle="an in-memory writer with the interface of tensorboardX", code="llmjax.train.log.MetricsLog")
def test_tensorboard_gets_the_same_numbers(evidence, tmp_path, monkeypatch):
    scalars, opened = {}, []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars[name, step] = value

        def close(self):
            opened.append("closed")

    fake = ModuleType("tensorboardX")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    log = MetricsLog(tmp_path, tensorboard=True)
    log.open(4)
    log.write({"step": 5, "loss": 0.5, "skipped": 0, "nll": math.nan})
    log.close()
    assert opened == [(str(tmp_path / "tensorboard"), 5), "closed"]
    assert scalars.keys() == {("loss", 5)}
    evidence.record(abs(scalars["loss", 5] - read_metrics(tmp_path)[0]["loss"]), 0)


def test_tensorboard_without_the_extra_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"train\.tensorboard=True needs tensorboardX.*llmjax\[track\]"):
        MetricsLog(tmp_path, tensorboard=True)
    assert not (tmp_path / FILE).exists()
