"""This machine, with one GPU or several: one process sees them all, in the background, until it is done."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmjax.config import InputError
from llmjax.launch.place import SCRIPTS, Command, Job, Launch, Place


@dataclass(frozen=True)
class Box(Place):
    """The machine that the command is given on."""

    on: ClassVar[str] = "box"

    def launch(self, job: Job) -> Launch:
        """Start the training loop here, so that it outlives the terminal."""
        target = job.machines.target
        if job.machines.family is not None:
            raise InputError(f"target={target.text!r} is a TPU slice: use --on=tpu-pod or --on=gke")
        if job.machines.hosts > 1:
            raise InputError(f"target={target.text!r} has {job.machines.hosts} hosts, a box is one: use --on=slurm")
        run_dir = job.run_dir or f"runs/{job.name}"
        train = job.train(str(Path(sys.executable).with_name("llmjax")), run_dir, join=False)
        return Launch(
            run_dir,
            (Command(("sh", f"{SCRIPTS}/start.sh", job.folder, *train), "start the training loop"),),
            then={
                "look": ("tail", "-n", "50", "-f", f"{job.folder}/train.log"),
                "save and stop": ("pkill", "-TERM", "-F", f"{job.folder}/pid"),
            },
        )
