"""The installed command starts itself again, once, where the system offers large pages."""

import sys

import pytest

from llmjax.cli import program


class ReplacedError(Exception):
    """Stands for a process that became another one."""


@pytest.fixture
def command(monkeypatch, tmp_path):
    """A function that runs the command line as if the system's setting were `pages`; returns what it became."""
    started = []

    def become(path, words):
        started.append((path, words))
        raise ReplacedError

    def run(*words, pages="always [madvise] never"):
        setting = tmp_path / "enabled"
        setting.write_text(pages)
        monkeypatch.setattr(program, "PAGES", setting)
        monkeypatch.setattr(program.os, "execv", become)
        monkeypatch.setattr(sys, "argv", ["llmjax", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "llmjax", *words])
        with pytest.raises((ReplacedError, SystemExit)):
            program.run()
        return started

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return run


def test_it_becomes_the_same_command_with_the_allocator_set(command, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert command("train", "--help") == [(sys.executable, [sys.executable, "-m", "llmjax", "train", "--help"])]
    assert program.os.environ["GLIBC_TUNABLES"] == program.TUNABLE
    assert len(command("train", "--help")) == 1, "a second start must not start again"


@pytest.mark.parametrize("pages", ["[always] madvise never", "always madvise [never]"])
def test_it_stays_where_pages_are_not_for_the_asking(command, pages):
    assert command("train", "--help", pages=pages) == []


def test_it_stays_for_verbs_that_compute_nothing(command):
    assert command("list", "--help") == []
    assert command("--help") == []
