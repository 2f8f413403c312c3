"""The shell scripts, run by a real shell around a stand-in for llmjax that is stopped twice and then is done."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "launch"
# A run of `steps` steps: each call makes what its line of `plan` says, and keeps where it stands as a checkpoint.
LLMJAX = """#!/bin/sh
cd {home} || exit 9
printf '%s\\0' "$@" >arguments
echo call >>calls
line=$(sed -n "$(wc -l <calls)p" plan)
set -- $line
case $1 in
    stop) mkdir -p run/checkpoints/$2; echo '{{"steps": 1, "stopped": "signal", "sample": {{"text": "x"}}}}' ;;
    done) mkdir -p run/checkpoints/$2; echo '{{"steps": 9, "stopped": "done", "sample": null}}' ;;
    early) echo '{{"stopped": "early_stopping"}}' ;;
    fail) [ -z "$3" ] || mkdir -p run/checkpoints/$3; echo 'error: no' >&2; exit $2 ;;
    mute) echo 'no figures' ;;
    lies) echo '{{"stopped": "signal", "sample": {{"text": "\\\\"stopped\\\\": \\\\"done\\\\""}}}}' ;;
    wait)
        trap 'mkdir -p run/checkpoints/$2; echo "{{\\"stopped\\": \\"signal\\"}}"; exit 0' TERM
        : >started
        while :; do sleep 0.02; done ;;
esac
"""


class Stage:
    """A folder with a stand-in for llmjax in it."""

    def __init__(self, home: Path):
        self.home = home
        self.llmjax = home / "llmjax"
        self.llmjax.write_text(LLMJAX.format(home=shlex.quote(str(home))))
        self.llmjax.chmod(0o755)
        self.command = ["sh", str(SCRIPTS / "train.sh"), str(home / "run"), str(self.llmjax), "train", "x.py", "a b"]
        self.options = {"env": os.environ | {"LAUNCH_PAUSE": "0"}, "stderr": subprocess.PIPE, "text": True}

    def plan(self, *lines: str) -> None:
        (self.home / "plan").write_text("\n".join(lines) + "\n")

    def run(self, *lines: str) -> subprocess.CompletedProcess:
        self.plan(*lines)
        return subprocess.run(self.command, stdout=subprocess.PIPE, timeout=30, check=False, **self.options)

    @property
    def calls(self) -> int:
        path = self.home / "calls"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def stage(tmp_path):
    home = tmp_path / "a folder with spaces"
    home.mkdir()
    return Stage(home)


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(shell, script):
    assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0


def test_a_run_that_is_preempted_twice_is_started_three_times(stage):
    done = stage.run("stop 1", "stop 2", "done 9")
    assert (done.returncode, stage.calls) == (0, 3)
    assert [line[:10] for line in done.stdout.splitlines()] == ['{"steps": '] * 3  # all of it is passed on
    assert (stage.home / "arguments").read_text().split("\0")[:-1] == ["train", "x.py", "a b"]


@pytest.mark.parametrize(
    ("lines", "code", "calls"),
    [
        (["done 9"], 0, 1),
        (["early"], 0, 1),
        (["fail 2", "fail 2", "fail 2"], 2, 3),
        (["fail 2", "done 9"], 0, 2),  # hosts that have not met
        (["fail 1", "fail 1", "fail 1"], 1, 3),
        (["fail 137", "stop 1", "fail 1", "fail 1", "done 9"], 0, 5),  # what was saved in between starts the count anew
        (["fail 1", "fail 1 4", "fail 1", "fail 1"], 1, 4),
        (["mute"], 1, 1),
        (["lies", "done 9"], 0, 2),  # what a sample says is not what the run says
    ],
)
def test_failures_are_tried_again_a_few_times(stage, lines, code, calls):
    done = stage.run(*lines)
    assert (done.returncode, stage.calls) == (code, calls)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_is_passed_on_and_the_step_is_saved(stage, whole_group):
    """75 says: not done. Slurm signals every process of a task, Kubernetes the first only."""
    stage.plan("wait 5", "done 9")
    loop = subprocess.Popen(stage.command, stdout=subprocess.PIPE, start_new_session=True, **stage.options)
    until((stage.home / "started").exists)
    (os.killpg if whole_group else os.kill)(loop.pid, signal.SIGTERM)
    out, _ = loop.communicate(timeout=30)
    assert (loop.returncode, stage.calls) == (75, 1)
    assert out == '{"stopped": "signal"}\n'
    assert (stage.home / "run" / "checkpoints" / "5").is_dir()


def test_a_process_in_the_background_is_started_once_and_can_be_stopped(stage):
    folder = stage.home / "runs" / "x.launch"
    stage.plan("wait 5")
    start = ["sh", str(SCRIPTS / "start.sh"), str(folder), *stage.command]
    assert subprocess.run(start, check=False, **stage.options).returncode == 0
    until((stage.home / "started").exists)
    again = subprocess.run(start, check=False, **stage.options)
    assert again.returncode == 1
    assert "runs already" in again.stderr
    pid = int((folder / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    until(lambda: '"stopped": "signal"' in (folder / "train.log").read_text())
    assert stage.calls == 1


def test_a_box_trains_until_it_is_done(checkout, stage, monkeypatch):
    """The launch itself, with the stand-in in the place of the command."""
    monkeypatch.setattr(sys, "executable", str(stage.home / "python"))
    monkeypatch.setenv("LAUNCH_PAUSE", "0")
    stage.plan("stop 1", "stop 2", "done 9")
    done = checkout.launch("experiments/tiny.py", "--on=box", "--name=tiny", "--target=cpu:1", "--run-dir=r u;n")
    assert (done.code, done.err) == (0, "")
    log = checkout.path / "runs" / "tiny.launch" / "train.log"
    until(lambda: log.exists() and '"stopped": "done"' in log.read_text())
    assert stage.calls == 3
    words = (stage.home / "arguments").read_text().split("\0")[:-1]
    assert words == ["train", "experiments/tiny.py", "--run-dir=r u;n", "--json"]


@pytest.mark.parametrize("version", [True, False])
def test_setup_takes_a_python_that_is_new_enough_or_fetches_one(version, tmp_path):
    """Stand-ins for the interpreters: one that answers and makes an environment, or none that is new enough."""
    fake = '#!/bin/sh\necho "$(basename $0) $*" >>{log}\n{rest}\n'
    make = 'for last; do :; done; mkdir -p "$last/bin"; cp {pip} "$last/bin/pip"'
    log, pip = tmp_path / "log", tmp_path / "pip"
    pip.write_text(fake.format(log=log, rest=""))
    pip.chmod(0o755)
    old = f'case "$*" in -c*) exit 1 ;; *uv\\ venv*) {make.format(pip=pip)} ;; esac'
    new = f'case "$*" in "-m venv"*) {make.format(pip=pip)} ;; esac'
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        rest = new if version and name == "python3.12" else old
        (tmp_path / name).write_text(fake.format(log=log, rest=rest))
        (tmp_path / name).chmod(0o755)
    path = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["sh", str(SCRIPTS / "setup.sh"), "tpu"], cwd=tmp_path, env=path, check=False)
    assert done.returncode == 0
    lines = log.read_text().splitlines()
    assert lines[-1] == "pip install .[tpu]"
    assert ("python3.12 -m venv --clear .venv" in lines) is version
    assert ("python3 -m uv venv --seed --python 3.12 .venv" in lines) is not version
