"""Cloud TPU slices as queued resources: order, wait, copy the commit, start on every worker.

One queued resource holds all slices; `--node=all --worker=all` reaches every host of every slice.
"""

import shlex
from dataclasses import dataclass
from typing import ClassVar

from llmjax.config import InputError
from llmjax.launch.machines import accelerator
from llmjax.launch.place import SCRIPTS, SHARED, Command, Job, Launch, Place, ship

GCLOUD = ("gcloud", "compute", "tpus", "queued-resources")
EVERYWHERE = ("--node=all", "--worker=all")
GONE = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
"""States from which a queued resource does not become active."""


@dataclass(frozen=True)
class TpuPod(Place):
    """Cloud TPU VMs of one slice, or of several."""

    on: ClassVar[str] = "tpu-pod"
    zone: str | None = None
    """Google Cloud zone; None for gcloud's own setting"""
    spot: bool = False
    """spare capacity: cheap, and taken back at any time"""
    nfs: str | None = None
    """SERVER:/EXPORT of a file system that every host mounts on /shared, such as Filestore's"""

    def launch(self, job: Job) -> Launch:
        """Order the slices, and start the training loop on each of their hosts."""
        run_dir = self.run_dir(job)
        state = self.gcloud("describe", job, "--format=value(state.state)")
        copy = self.gcloud(
            "scp", job, *EVERYWHERE, words=(f"{job.folder}/code.tar.gz", f"{job.name}:{job.name}.tar.gz")
        )
        setup = shlex.join(["sh", f"{SCRIPTS}/setup.sh", "tpu", *([self.nfs] if self.nfs else [])])
        unpack = f"mkdir -p {job.name} && tar -xzf {job.name}.tar.gz -C {job.name} && cd {job.name} && {setup}"
        train = job.train(".venv/bin/llmjax", run_dir, join=job.hosts > 1)
        loop = f"cd {job.name} && {shlex.join(['sh', f'{SCRIPTS}/start.sh', job.folder, *train])}"
        start = self.gcloud("ssh", job, *EVERYWHERE, f"--command={loop}")
        log, pid = f"{job.name}/{job.folder}/train.log", f"{job.name}/{job.folder}/pid"
        return Launch(
            run_dir,
            (
                *ship(job),
                Command(self.order(job), "order the slices"),
                Command(state, "wait for the slices", until="ACTIVE", never=GONE),
                Command(copy, "copy the code to every host"),
                Command(self.gcloud("ssh", job, *EVERYWHERE, f"--command={unpack}"), "install it there"),
                Command(start, "start the training loop on every host"),
            ),
            notes=("what a spot slice lost goes on after `delete` and the same launch again",) if self.spot else (),
            then={
                "look": self.gcloud("ssh", job, "--node=0", "--worker=0", f"--command=tail -n 50 -f {log}"),
                "see its state": state,
                "start again": start,
                "save and stop": self.gcloud("ssh", job, *EVERYWHERE, f"--command=kill $(cat {pid})"),
                "delete": self.gcloud("delete", job, "--force"),
            },
        )

    def gcloud(self, verb: str, job: Job, *flags: str, words: tuple[str, ...] = ()) -> tuple[str, ...]:
        """A gcloud command about the job's queued resource, or about the `words` in its place."""
        zone = (f"--zone={self.zone}",) if self.zone else ()
        return (*GCLOUD, verb, *(words or (job.name,)), *zone, *flags)

    def order(self, job: Job) -> tuple[str, ...]:
        """The command that orders the slices; raises InputError where the Cloud TPU API has none of them."""
        found, family = job.machines, job.machines.family
        if family is None:
            raise InputError(f"target={found.target.text!r} is no TPU: use --on=slurm or --on=box")
        if family.runtime is None:
            raise InputError(
                f"target={found.target.text!r}: the Cloud TPU API has no {family.accelerator}: use --on=gke"
            )
        several = (f"--node-count={job.slices}", f"--node-prefix={job.name}")
        nodes = several if job.slices > 1 else (f"--node-id={job.name}",)
        kind, spot = accelerator(found, family), ("--spot",) if self.spot else ()
        command = self.gcloud("create", job, *nodes, *kind, f"--runtime-version={family.runtime}", *spot)
        # Only the alpha command knows topologies of chips after v4.
        return command if len(kind) == 1 else (command[0], "alpha", *command[1:])

    def run_dir(self, job: Job) -> str:
        """The run directory on the hosts; raises InputError where they would not share it."""
        if job.hosts > 1 and not self.nfs:
            raise InputError(
                f"{job.hosts} hosts share the run directory: give --nfs=SERVER:/EXPORT, mounted on {SHARED}"
            )
        run_dir = job.run_dir or (f"{SHARED}/{job.name}" if self.nfs else f"runs/{job.name}")
        if self.nfs and not run_dir.startswith(f"{SHARED}/"):
            raise InputError(f"--run-dir={run_dir} is not on the shared file system: use {SHARED}/{job.name}")
        return run_dir
