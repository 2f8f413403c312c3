"""TPU slices of a Kubernetes cluster (GKE): an image of the commit, and a JobSet with one pod a host.

A job of the set is a slice, an exclusive node pool of it. A pod that was stopped in order exits with AGAIN, one whose
node was taken has the condition DisruptionTarget: both restart the set for nothing; what else fails is counted.
"""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from llmjax.config import InputError
from llmjax.launch.machines import Family
from llmjax.launch.place import AGAIN, GRACE, SCRIPTS, SHARED, Command, Job, Launch, Place, ship

RESTARTS = 10
"""Failures of the whole set, preemptions not counted."""
PORTS = (8471, 8080, 8476)
"""Of the TPUs of a slice among each other, of slices, and of jax's coordinator."""


@dataclass(frozen=True)
class Gke(Place):
    """Pods on TPU node pools of a GKE cluster that has the JobSet controller (0.6 or newer)."""

    on: ClassVar[str] = "gke"
    image: str | None = None
    """where the image is pushed to, such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/llmjax:TAG"""
    claim: str | None = None
    """persistent volume claim (ReadWriteMany) that every pod mounts on /shared"""
    spot: bool = False
    """nodes of spare capacity: cheap, and taken back at any time"""

    def launch(self, job: Job) -> Launch:
        """Build and push the image, then apply the JobSet."""
        family = job.machines.family
        if family is None:
            raise InputError(f"target={job.machines.target.text!r} is no TPU: use --on=slurm or --on=box")
        if not self.image:
            raise InputError("--on=gke needs --image=REGISTRY/NAME:TAG: where the image of this commit is pushed to")
        if not self.claim:
            raise InputError(f"--on=gke needs --claim=NAME: the persistent volume claim that pods mount on {SHARED}")
        run_dir = job.run_dir or f"{SHARED}/{job.name}"
        if not run_dir.startswith(f"{SHARED}/"):
            raise InputError(f"--run-dir={run_dir} is not on the shared volume: use {SHARED}/{job.name}")
        path = f"{job.folder}/jobset.json"
        build = ("docker", "build", f"--tag={self.image}", f"--file={SCRIPTS}/Dockerfile", job.folder)
        machine = f"{family.machine}-{job.machines.chips_per_host}t"
        pool = f"{job.slices} node pool(s) of {job.machines.hosts} x {machine}, topology {job.machines.topology}"
        return Launch(
            run_dir,
            (
                *ship(job),
                Command(build, "an image of the commit"),
                Command(("docker", "push", self.image), "to where the cluster takes it from"),
                Command(("kubectl", "apply", f"--filename={path}"), "start the pods"),
            ),
            files={path: json.dumps(self.manifest(job, family, run_dir), indent=2) + "\n"},
            notes=(f"the cluster needs {pool}",),
            then={
                "look": ("kubectl", "logs", "--follow", f"job/{job.name}-slice-0"),
                "see its state": ("kubectl", "get", "jobset", job.name),
                "save, stop and delete": ("kubectl", "delete", "jobset", job.name),
            },
        )

    def manifest(self, job: Job, family: Family, run_dir: str) -> dict[str, Any]:
        """The JobSet (jobset.x-k8s.io/v1alpha2)."""
        preempted = {
            "action": "FailJob",
            "onExitCodes": {"containerName": "train", "operator": "In", "values": [AGAIN]},
        }
        taken = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        slices = {
            "parallelism": job.machines.hosts,
            "completions": job.machines.hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [preempted, taken]},
            "template": {"spec": self.pod(job, family, run_dir)},
        }
        again = {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
        own_pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": job.name, "annotations": own_pool},
            "spec": {
                "failurePolicy": {"maxRestarts": RESTARTS, "rules": [again]},
                "replicatedJobs": [{"name": "slice", "replicas": job.slices, "template": {"spec": slices}}],
            },
        }

    def pod(self, job: Job, family: Family, run_dir: str) -> dict[str, Any]:
        """One host's pod: all of its chips, the shared volume, the training loop."""
        nodes = {
            "cloud.google.com/gke-tpu-accelerator": family.label,
            "cloud.google.com/gke-tpu-topology": job.machines.topology,
        }
        container = {
            "name": "train",
            "image": self.image,
            # Kubernetes fills in $(NAME) unless its dollar is doubled.
            "command": [word.replace("$(", "$$(") for word in job.train("llmjax", run_dir, join=job.hosts > 1)],
            "ports": [{"containerPort": port} for port in PORTS],
            "resources": {"limits": {"google.com/tpu": job.machines.chips_per_host}},
            "volumeMounts": [{"name": "shared", "mountPath": SHARED}],
        }
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE,
            "nodeSelector": nodes | ({"cloud.google.com/gke-spot": "true"} if self.spot else {}),
            "containers": [container],
            "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": self.claim}}],
        }
