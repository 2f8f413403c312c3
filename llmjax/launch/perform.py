"""A launch shown, or carried out: the same files and the same commands."""

import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llmjax.launch.place import Command, Launch
from llmjax.train.errors import RunError

INTERVAL = 30.0
"""Seconds between two looks at a state that is waited for."""


def shown(launch: Launch) -> Iterator[str]:
    """What would be written and run, to the letter: a command is a line that begins with `$ `."""
    for path, text in launch.files.items():
        yield f"# writes {path}\n{text.rstrip()}\n# end of {path}"
    for command in launch.commands:
        yield f"{heading(command)}\n$ {shlex.join(command.argv)}"


def heading(command: Command) -> str:
    """What a command is for."""
    again = f", every {INTERVAL:.0f} s until it prints {command.until}" if command.until else ""
    return f"# {command.why}{again}"


def perform(launch: Launch, say: Callable[[str], None]) -> None:
    """Write the files, then run the commands in order. Raises RunError, which names it, at the first that fails."""
    for path, text in launch.files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
        say(f"# wrote {path}")
    for command in launch.commands:
        say(f"{heading(command)}\n$ {shlex.join(command.argv)}")
        if command.until:
            wait(command, say)
        else:
            once(command)


def once(command: Command, capture: bool = False) -> str:
    """Run a command without a shell; returns what it printed, where that is captured."""
    try:
        done = subprocess.run(command.argv, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    except OSError as error:
        raise RunError(f"{command.argv[0]}: {error.strerror}: install it to {command.why}") from None
    if done.returncode:
        code = f"ended with exit code {done.returncode}"
        raise RunError(f"{shlex.join(command.argv)} {code} ({command.why})")
    return (done.stdout or "").strip()


def wait(command: Command, say: Callable[[str], None]) -> None:
    """Run a command until it prints what is waited for. Raises RunError where it prints that this will not be."""
    last = ""
    while (state := once(command, capture=True)) != command.until:
        if state in command.never:
            raise RunError(f"{shlex.join(command.argv)} says {state}, which will not become {command.until}")
        if state != last:
            say(f"# {state or 'nothing yet'}")
        last = state
        time.sleep(INTERVAL)
