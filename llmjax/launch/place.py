"""The base of all places: a job goes in, files and commands come out; a subclass in this folder is a place."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

from llmjax.config import InputError, subclasses
from llmjax.launch.machines import Machines

SCRIPTS = "scripts/launch"
SHARED = "/shared"
"""Where a file system that all hosts share is mounted, in places whose machines come without one."""
GRACE = 120
"""Seconds between the first signal and the last: the time to save in."""
AGAIN = 75
"""Exit code of train.sh where a signal stopped it: not done, to be gone on with."""
NAME_LENGTH = 40


@dataclass(frozen=True)
class Command:
    """One program with its arguments, run without a shell."""

    argv: tuple[str, ...]
    why: str
    """what it is for: shown before it, and after it where it failed"""
    until: str = ""
    """run it again and again until this is all that it prints"""
    never: tuple[str, ...] = ()
    """what it prints where waiting has become useless"""


@dataclass(frozen=True)
class Launch:
    """Everything that starting a job takes: files first, then commands in order."""

    run_dir: str
    commands: tuple[Command, ...]
    files: dict[str, str] = field(default_factory=dict)
    """text by path, relative to the working directory"""
    notes: tuple[str, ...] = ()
    """what a reader should know before it begins"""
    then: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """commands for later, by what they do: look, stop, delete"""


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what."""

    name: str
    experiment: str
    overrides: tuple[str, ...]
    run_dir: str | None
    """None for the place's own choice"""
    machines: Machines
    slices: int = 1
    """TPU slices, joined by a slow network"""

    @property
    def folder(self) -> str:
        """Where files of the launch itself lie: beside the run directory's usual place, never in it."""
        return f"runs/{self.name}.launch"

    @property
    def hosts(self) -> int:
        """Machines in all."""
        return self.machines.hosts * self.slices

    def train(self, llmjax: str, run_dir: str, join: bool) -> tuple[str, ...]:
        """The loop around `llmjax train`; with `join` its processes find each other."""
        hosts = ("--hosts=auto",) if join else ()
        words = (llmjax, "train", self.experiment, f"--run-dir={run_dir}", *self.overrides, *hosts, "--json")
        return ("sh", f"{SCRIPTS}/train.sh", run_dir, *words)


@dataclass(frozen=True)
class Place:
    """Where a job runs; the fields of a subclass are the options that it takes on the command line."""

    on: ClassVar[str]

    def launch(self, job: Job) -> Launch:
        """Files and commands that start the job here; raises InputError where it cannot run here."""
        raise NotImplementedError


def places() -> dict[str, type[Place]]:
    """Every place by the word that `--on` takes."""
    return {cls.on: cls for cls in subclasses(Place).values() if issubclass(cls, Place)}


def check_name(name: str) -> None:
    """Raise InputError for a name that machines, jobs and nodes cannot have (RFC 1035, with room for numbers)."""
    if re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= NAME_LENGTH:
        return
    better = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:NAME_LENGTH].strip("-")
    raise InputError(
        f"--name={name!r} must be at most {NAME_LENGTH} lowercase letters, digits and hyphens that begin with a letter "
        f"and do not end with a hyphen (RFC 1035): use for example {better or 'run-1'}"
    )


def ship(job: Job) -> tuple[Command, ...]:
    """Pack the commit that is checked out; what is not committed would be missing there, so it is refused."""
    file = job.experiment.partition(":")[0]
    archive = f"{job.folder}/code.tar.gz"
    return (
        Command(("git", "ls-files", "--error-unmatch", "--", file), "the experiment has to be in the commit"),
        Command(("git", "diff", "--quiet", "HEAD"), "what is changed and not committed would be left behind"),
        Command(("mkdir", "-p", job.folder), "files of this launch"),
        Command(("git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"), "the code, as committed"),
    )
