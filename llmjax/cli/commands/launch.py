"""`llmjax launch`: train on machines that are elsewhere, or print what that would take."""

import shlex
from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llmjax.config import InputError, did_you_mean
from llmjax.experiment import load_experiment
from llmjax.launch.machines import check_mesh, machines
from llmjax.launch.perform import perform, shown
from llmjax.launch.place import SCRIPTS, Job, Launch, Place, check_name, places


def run(arguments: Namespace) -> dict[str, Any]:
    """Check everything, then print the launch or carry it out; returns its files and commands."""
    job, launch = made(arguments)
    print(f"# {job.machines}" + (f", {job.slices} slices of it" if job.slices > 1 else ""))
    print(f"# run directory {launch.run_dir}", *(f"# {note}" for note in launch.notes), sep="\n", flush=True)
    if arguments.dry_run:
        print("\n".join(shown(launch)))
    else:
        perform(launch, lambda line: print(line, flush=True))
    width = max(map(len, launch.then)) + 1
    print("\n".join(f"# to {what + ':':<{width}} {shlex.join(argv)}" for what, argv in launch.then.items()))
    figures = {"name": job.name, "target": job.machines.target.text, "hosts": job.hosts, "dry_run": arguments.dry_run}
    return figures | asdict(launch) | {"commands": [command.argv for command in launch.commands]}


def made(arguments: Namespace) -> tuple[Job, Launch]:
    """The job and its launch; raises InputError for whatever is wrong, before anything is run."""
    place = chosen(arguments)
    check_name(arguments.name)
    found = machines(arguments.target)
    if not Path(SCRIPTS, "train.sh").exists():
        raise InputError(f"there is no {SCRIPTS} here: run llmjax launch in the root of the checkout")
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    slices = experiment.mesh.slices if found.family else 1
    where = f"target={found.target.text}" + (f" x {slices} slices" if slices > 1 else "")
    check_mesh(experiment.mesh, found.devices * slices, where)
    job = Job(
        name=arguments.name,
        experiment=within(arguments.experiment),
        overrides=tuple(arguments.overrides),
        run_dir=arguments.run_dir,
        machines=found,
        slices=slices,
    )
    return job, place.launch(job)


def chosen(arguments: Namespace) -> Place:
    """The place with its options; raises InputError for an unknown place, or an option that it does not take."""
    known = places()
    if arguments.on not in known:
        hint = did_you_mean(arguments.on, known) or f": there are {', '.join(known)}"
        raise InputError(f"--on={arguments.on} is no place{hint}")
    cls = known[arguments.on]
    own = [field.name for field in fields(cls)]
    given = {}
    for name in sorted({field.name for other in known.values() for field in fields(other)}):
        value = getattr(arguments, name)
        if value and name not in own:
            takes = " ".join(["it takes", ", ".join(f"--{option}" for option in own) or "none"])
            raise InputError(f"--{name} is no option of {arguments.on}: {takes}")
        if value:
            given[name] = value
    return cls(**given)


def within(spec: str) -> str:
    """An experiment's spec with its path relative to the working directory where it lies below that."""
    file, colon, variant = spec.partition(":")
    path = Path(file).resolve()
    inside = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(file)
    return f"{inside}{colon}{variant}"
