"""A checkout to launch from, and stand-ins for the programs of clouds and clusters that record their calls."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from llmjax.cli import main

ROOT = Path(__file__).resolve().parents[2]
FAKE = """#!{python} -IS
import json, os, sys
from pathlib import Path
home = Path({home!r})
argv = [Path(sys.argv[0]).name, *sys.argv[1:]]
with (home / "calls.jsonl").open("a") as log:
    log.write(json.dumps(argv) + "\\n")
says = home / f"{{argv[0]}}.says"
lines = says.read_text().splitlines() if says.exists() and "describe" in argv else []
if lines:
    print(lines[0])
    says.write_text("\\n".join(lines[1:]))
fails = home / "fails"
if fails.exists() and fails.read_text() in argv:
    sys.exit(7)
"""
COMMITTED = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


class Called(NamedTuple):
    """What a call of the command left behind."""

    code: int
    out: str
    err: str


class Checkout:
    """A git checkout with experiments and scripts, the working directory of a test."""

    def __init__(self, path: Path, fakes: Path):
        self.path, self.fakes = path, fakes

    def launch(self, *words: str) -> Called:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["launch", *words])
        return Called(code, out.getvalue(), err.getvalue())

    def calls(self) -> list[list[str]]:
        """The argv of every call of a stand-in, in order."""
        log = self.fakes / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def states(self, *states: str) -> None:
        """What `gcloud ... describe` prints, one a call."""
        (self.fakes / "gcloud.says").write_text("\n".join(states))

    def fail(self, word: str) -> None:
        """Every call of a stand-in with this argument ends with exit code 7."""
        (self.fakes / "fails").write_text(word)


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experiments and scripts of this repository, committed in a repository of their own."""
    path = tmp_path_factory.mktemp("origin") / "checkout"
    for name in ("experiments", "scripts/launch"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (path / ".gitignore").write_text("runs/\n__pycache__/\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run(["git", *command], cwd=path, env=os.environ | COMMITTED, check=True)
    return path


@pytest.fixture
def checkout(committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A fresh copy of the checkout as the working directory, and the stand-ins before everything else on PATH."""
    path, fakes = tmp_path / "checkout", tmp_path / "fakes"
    shutil.copytree(committed, path)
    fakes.mkdir()
    for name in ("gcloud", "kubectl", "docker", "sbatch"):
        (fakes / name).write_text(FAKE.format(python=sys.executable, home=str(fakes)))
        (fakes / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fakes}:{os.environ['PATH']}")
    monkeypatch.chdir(path)
    monkeypatch.setattr("llmjax.launch.perform.INTERVAL", 0.0)
    return Checkout(path, fakes)
