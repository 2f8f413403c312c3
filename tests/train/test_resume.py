"""A run that was stopped anywhere, however rudely, ends bit by bit like one that was not."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmjax.train import checkpoint
from llmjax.train.checkpoint import FOLDER, HIDDEN, place
from llmjax.train.log import FILE, read_metrics
from llmjax.train.loop import fit
from llmjax.train.state import plan
from tests.evidence import evidence
from tests.train.killed import experiment, long
from tests.train.tiny import differing

ROOT = Path(__file__).resolve().parents[2]
TIMING = {"seconds", "tokens_per_second", "data_wait_fraction", "val_seconds", "mfu"}
KILLS, KILLS_DURING_SAVE, MOST_KILLS = 11, 3, 20


def lines(run_dir):
    """The logged lines without what depends on the clock."""
    return [{name: x for name, x in line.items() if name not in TIMING} for line in read_metrics(run_dir)]


def compare_runs(config, run_dir, other):
    """The number of bytes in which parameters, optimizer state and average differ; logged lines are equal."""
    target = plan(config.model, config.optimizer, config.train, config.mesh.build()).abstract
    mine, theirs = (checkpoint.newest(folder, pytest.fail) for folder in (run_dir, other))
    assert mine.step == theirs.step == config.train.steps
    bytes_apart = differing(*(found.state(target) for found in (mine, theirs)))
    assert lines(run_dir) == lines(other)
    clock = {"seconds"}
    assert {k: v for k, v in mine.progress.items() if k not in clock} == {
        k: v for k, v in theirs.progress.items() if k not in clock
    }
    return bytes_apart


@pytest.mark.slow
@evidence("E54", oracle="the uninterrupted run, bit by bit", code="llmjax.train.loop.fit")
def test_resuming_at_any_checkpoint_repeats_the_run(evidence, tmp_path):
    config = experiment(checkpoint_every=1, keep_last=99)
    whole = tmp_path / "whole"
    fit(config, whole)
    assert len(checkpoint.steps(whole)) == 12
    for cut in (1, 4, 8, 11):
        part = tmp_path / f"from{cut}"
        shutil.copytree(whole, part)
        for step in checkpoint.steps(part):
            if step > cut:
                shutil.rmtree(place(part, step))
        with (part / FILE).open("a") as file:
            file.write('{"step": 13, "lo')
        events = []
        fit(config, part, report=events.append)
        assert {"event": "resume", "step": cut} in events
        evidence.record(compare_runs(config, part, whole), 0)


def test_two_runs_are_bitwise_equal(tmp_path):
    config = experiment(steps=6)
    for name in ("one", "two"):
        fit(config, tmp_path / name)
    assert compare_runs(config, tmp_path / "one", tmp_path / "two") == 0


def start(run_dir, pause=0.1):
    """A training process that rests after each line it logs."""
    command = [sys.executable, "-m", "tests.train.killed", str(run_dir), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def saving(run_dir):
    """Whether a checkpoint is being written."""
    return any((run_dir / FOLDER).glob(f"{HIDDEN}[0-9]*"))


def newer_than(run_dir, steps):
    """A function that tells whether there are checkpoints beside those."""
    return lambda: bool(set(checkpoint.steps(run_dir)) - set(steps))


def wait_for(condition, process, seconds=120.0):
    """Wait until something holds, or the process has ended; True where it holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.slow
@evidence("E54", oracle="the uninterrupted run, after a dozen SIGKILLs", code="llmjax.train.loop.fit")
def test_killed_runs_end_like_the_uninterrupted_one(evidence, tmp_path):
    config = long()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(config, whole)
    draw, during_save, resumed = random.Random(0), 0, set()
    startup = 0.0
    for number in range(MOST_KILLS):
        if number >= KILLS and during_save >= KILLS_DURING_SAVE:
            break
        process, begin = start(killed), time.monotonic()
        before = checkpoint.steps(killed)
        if number % 3 == 0 or number >= KILLS:
            # A sweep at the start may show a leftover: wait until this process has written a checkpoint.
            written = newer_than(killed, before)
            assert wait_for(written, process), process.communicate()[0]
            startup = startup or time.monotonic() - begin
            assert wait_for(lambda: saving(killed), process), process.communicate()[0]
            time.sleep(draw.uniform(0, 0.01))
        else:
            time.sleep(draw.uniform(0.3 * startup, startup + 1.5))
        process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
        during_save += saving(killed)
        resumed.add(max(checkpoint.steps(killed), default=0))
        assert "warning" not in output, output
    assert during_save >= KILLS_DURING_SAVE
    assert len(resumed) > 3, "the kills were not spread over the run"
    process = start(killed, pause=0)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    evidence.record(compare_runs(config, killed, whole), 0)


@pytest.mark.slow
def test_sigterm_ends_with_zero_and_the_step_saved(tmp_path):
    process = start(tmp_path)
    assert wait_for(lambda: (tmp_path / FILE).exists() and len(read_metrics(tmp_path)) > 1, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    (last,) = checkpoint.steps(tmp_path)[-1:]
    assert f"'step': {last}" in output
    assert "'stopped': 'signal'" in output
    assert checkpoint.newest(tmp_path, pytest.fail).step == last
    assert not saving(tmp_path)
