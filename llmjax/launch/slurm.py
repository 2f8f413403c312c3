"""GPU nodes of a Slurm cluster: one batch job of whole nodes, one task a GPU, put back into the queue until it is done.

jax takes one GPU a process where Slurm starts it (SLURM_LOCALID), so there is a task for each. All nodes see the
working directory and the environment that `llmjax launch` is run from, as clusters have it.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmjax.config import InputError
from llmjax.launch.place import AGAIN, GRACE, Command, Job, Launch, Place

PLAIN = r"[\w.,:@%+=/-]+"


@dataclass(frozen=True)
class Slurm(Place):
    """A batch job on GPU nodes."""

    on: ClassVar[str] = "slurm"
    partition: str | None = None
    """Slurm's partition; None for the cluster's default"""
    account: str | None = None
    """whom Slurm charges; None for the user's default"""
    time: str | None = None
    """limit of one stay on the nodes, as 12:00:00 or 2-00:00:00; None for the partition's"""

    def launch(self, job: Job) -> Launch:
        """Write the batch script and submit it."""
        target = job.machines.target
        if target.chip is None or target.chip.platform != "gpu":
            raise InputError(f"target={target.text!r} has no GPUs: use hosts x 1 x GPUs a host, as h200:4x1x8")
        run_dir = job.run_dir or f"runs/{job.name}"
        path = f"{job.folder}/job.sbatch"
        return Launch(
            run_dir,
            (Command(("sbatch", path), "into the queue"),),
            files={path: self.script(job, run_dir)},
            then={
                "look": ("tail", "-n", "50", "-F", f"{job.folder}/train.log"),
                "see its state": ("squeue", f"--name={job.name}"),
                "save and queue again": ("scancel", "--signal=TERM", f"--name={job.name}"),
                "save and stop": ("scancel", f"--name={job.name}"),
            },
        )

    def script(self, job: Job, run_dir: str) -> str:
        """The batch script."""
        options = {
            "job-name": job.name,
            "nodes": job.machines.hosts,
            "ntasks-per-node": job.machines.chips_per_host,
            "gpus-per-node": job.machines.chips_per_host,
            "exclusive": None,
            "mem": 0,
            **{name: getattr(self, name) for name in ("partition", "account", "time") if self.option(name)},
            "requeue": None,
            "signal": f"TERM@{GRACE}",
            "open-mode": "append",
            "output": f"{job.folder}/train.log",
        }
        lines = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()]
        llmjax = str(Path(sys.executable).with_name("llmjax"))
        train = shlex.join(job.train(llmjax, run_dir, join=job.machines.devices > 1))
        return "\n".join(
            [
                "#!/bin/bash",
                *lines,
                "",
                "# One task a GPU; a task that ends does not end the others, which notice and save.",
                f"srun --cpu-bind=none --kill-on-bad-exit=0 {train}",
                "code=$?",
                f'if [ "$code" -eq {AGAIN} ]; then  # stopped in order: not done',
                '    scontrol requeue "$SLURM_JOB_ID"',
                "fi",
                'exit "$code"',
                "",
            ]
        )

    def option(self, name: str) -> bool:
        """Whether an option is given; raises InputError where it would not stay one word in the script."""
        value = getattr(self, name)
        if value is not None and not re.fullmatch(PLAIN, value):
            raise InputError(f"--{name}={value!r} is not one plain word: letters, digits and . , : @ % + = / - only")
        return value is not None
