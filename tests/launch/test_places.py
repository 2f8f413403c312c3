"""Every place: what is shown is what is called, in order; words survive shells; the first failure ends it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jsonschema
import pytest

from llmjax.launch.place import places

HERE = Path(__file__).resolve().parent
POD = (
    *("experiments/tiny.py", "--on=tpu-pod", "--name=tiny", "--target=v5p:4x4x4", "--mesh.data=64"),
    *("--data.batch_size=512", "--zone=us-east5-a", "--nfs=10.0.0.2:/share"),
)
GKE = (
    *("experiments/tiny.py:windowed", "--on=gke", "--name=tiny", "--target=v6e:16x16", "--mesh.data=256"),
    *("--data.batch_size=512", "--image=eu.example/llmjax:1", "--claim=runs"),
)
SLURM = ("experiments/tiny.py", "--on=slurm", "--name=tiny", "--target=h200:2x1x8", "--mesh.data=16")
BOX = ("experiments/tiny.py", "--on=box", "--name=tiny", "--target=cpu:1")
ODD = "a b'c\";touch pwned $(touch pwned) `touch pwned` \\ & | > $HOME *"
"""What a shell would make something else of, were it not quoted."""


def shown(out: str) -> list[list[str]]:
    """The commands of a dry run, as argv."""
    return [shlex.split(line[2:]) for line in out.splitlines() if line.startswith("$ ")]


def written(out: str, path: str) -> str:
    """The text of a file that a dry run would write."""
    return out.partition(f"# writes {path}\n")[2].partition(f"# end of {path}\n")[0]


def remote(argv: list[str]) -> str:
    """The command that gcloud sends to a host."""
    (word,) = (word for word in argv if word.startswith("--command="))
    return word.removeprefix("--command=")


def received(command: list[str], cwd: Path) -> list[str]:
    """What a program gets as its arguments, when `command` runs in `cwd`, where it is started through ./seen."""
    subprocess.run(command, cwd=cwd, check=True, env=os.environ | {"PATH": f"{cwd}:{os.environ['PATH']}"})
    return (cwd / "seen.txt").read_text().split("\0")[:-1]


def recorder(path: Path, cwd: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {shlex.quote(str(cwd / 'seen.txt'))}\n")
    path.chmod(0o755)


def test_places_are_found_by_type():
    assert set(places()) == {"tpu-pod", "gke", "slurm", "box"}


@pytest.mark.parametrize("words", [POD, GKE, SLURM], ids=["tpu-pod", "gke", "slurm"])
def test_a_dry_run_shows_what_a_launch_then_does(words, checkout):
    """The same argv in the same order, the same text in the same files; and the dry run itself touches nothing."""
    dry = checkout.launch(*words, "--dry-run")
    assert (dry.code, dry.err) == (0, "")
    assert checkout.calls() == []
    assert not (checkout.path / "runs").exists()
    checkout.states("ACTIVE")
    done = checkout.launch(*words)
    assert (done.code, done.err) == (0, "")
    outside = [argv for argv in shown(dry.out) if argv[0] not in ("git", "mkdir")]
    assert checkout.calls() == outside
    for path in (checkout.path / "runs").rglob("*"):
        if path.suffix in (".json", ".sbatch"):
            assert written(dry.out, str(path.relative_to(checkout.path))) == path.read_text()


def test_a_pod_is_ordered_awaited_filled_and_started(checkout):
    checkout.states("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    assert checkout.launch(*POD).code == 0
    calls = checkout.calls()
    assert [argv[4] for argv in calls] == ["create", "describe", "describe", "describe", "scp", "ssh", "ssh"]
    assert calls[0][5:] == [
        *("tiny", "--zone=us-east5-a", "--node-id=tiny"),
        *("--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"),
    ]
    assert {"--node=all", "--worker=all"} < set(calls[4]) & set(calls[5]) & set(calls[6])
    assert "sh scripts/launch/setup.sh tpu 10.0.0.2:/share" in remote(calls[5])
    assert "--run-dir=/shared/tiny --mesh.data=64 --data.batch_size=512 --hosts=auto --json" in remote(calls[6])
    with tarfile.open(calls[4][5]) as archive:
        assert {"experiments/tiny.py", "scripts/launch/train.sh"} < set(archive.getnames())


def test_a_shape_that_no_accelerator_type_stands_for_is_ordered_by_the_alpha_command(checkout):
    """`gcloud compute tpus queued-resources create --type` takes v2 to v4, its alpha all (Cloud SDK 528)."""
    words = [word.replace("4x4x4", "4x4x16") for word in POD]
    out = checkout.launch(*words, "--mesh.data=256", "--dry-run").out
    (create,) = (argv for argv in shown(out) if "create" in argv)
    assert create[:6] == ["gcloud", "alpha", "compute", "tpus", "queued-resources", "create"]
    assert {"--type=v5p", "--topology=4x4x16"} < set(create)


def test_two_slices_are_one_queued_resource(checkout):
    words = ["--mesh.slices=2", "--mesh.data=128", "--spot"]
    out = checkout.launch(*POD, *words, "--dry-run").out
    (create,) = (argv for argv in shown(out) if "create" in argv)
    assert {"--node-count=2", "--node-prefix=tiny", "--spot"} < set(create)
    assert "--node-id=tiny" not in create


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_pod_that_will_not_come_ends_the_wait(state, checkout):
    checkout.states("WAITING_FOR_RESOURCES", state)
    done = checkout.launch(*POD)
    assert done.code == 1
    assert f"says {state}, which will not become ACTIVE" in done.err
    assert len(done.err.splitlines()) == 1
    assert [argv[4] for argv in checkout.calls()] == ["create", "describe", "describe"]


@pytest.mark.parametrize(
    ("words", "word", "last"),
    [
        (POD, "create", "create"),
        (POD, "scp", "scp"),
        (GKE, "push", "push"),
        (GKE, "apply", "apply"),
        (SLURM, "runs/tiny.launch/job.sbatch", "sbatch"),
    ],
)
def test_the_first_failure_ends_the_launch(words, word, last, checkout):
    """One line that names the command and its exit code; nothing after it is called."""
    checkout.states("ACTIVE")
    checkout.fail(word)
    done = checkout.launch(*words)
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert "ended with exit code 7" in done.err
    failed = checkout.calls()[-1]
    assert last in failed
    assert shlex.join(failed) in done.err


def test_a_program_that_is_not_there_is_named(checkout, monkeypatch):
    """No program of this machine is on PATH but git and what that needs: a real kubectl must not be met."""
    (checkout.fakes / "kubectl").unlink()
    for name in ("git", "mkdir", "gzip", "sh"):
        (checkout.fakes / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(checkout.fakes))
    done = checkout.launch(*GKE)
    assert (done.code, done.err) == (1, "error: kubectl: No such file or directory: install it to start the pods\n")


@pytest.mark.parametrize("words", [POD, GKE], ids=["tpu-pod", "gke"])
def test_only_what_is_committed_is_shipped_so_the_rest_is_refused(words, checkout):
    (checkout.path / "experiments" / "mine.py").write_text((checkout.path / words[0].partition(":")[0]).read_text())
    done = checkout.launch(words[0].replace("tiny.py", "mine.py"), *words[1:])
    assert done.code == 1
    assert "the experiment has to be in the commit" in done.err
    (checkout.path / "experiments" / "mine.py").unlink()
    with (checkout.path / "experiments" / "tiny.py").open("a") as file:
        file.write("# changed\n")
    done = checkout.launch(*words)
    assert done.code == 1
    assert "git diff --quiet HEAD ended with exit code 1" in done.err
    assert checkout.calls() == []


def test_words_survive_the_shell_of_a_host(checkout, tmp_path):
    """What gcloud sends is run by a real shell; the training loop gets its words as they were given."""
    override = "--train.steps=7"
    out = checkout.launch(*POD, f"--run-dir=/shared/{ODD}", override, "--dry-run").out
    start = remote([argv for argv in shown(out) if argv[:5][-1:] == ["ssh"]][-1])
    recorder(tmp_path / "tiny" / "scripts" / "launch" / "start.sh", tmp_path)
    seen = received(["sh", "-c", start], tmp_path)
    assert seen == [
        *("runs/tiny.launch", "sh", "scripts/launch/train.sh", f"/shared/{ODD}", ".venv/bin/llmjax", "train"),
        *("experiments/tiny.py", f"--run-dir=/shared/{ODD}", *POD[4:6], override, "--hosts=auto", "--json"),
    ]
    assert not [*tmp_path.rglob("pwned")]


def test_words_survive_the_batch_script(checkout, tmp_path):
    mixer = "--model.pattern.0.mixer=Attention(heads=2, mask=Window(size=32))"
    out = checkout.launch(*SLURM, f"--run-dir={ODD}", mixer, "--dry-run").out
    script = tmp_path / "job.sbatch"
    script.write_text(written(out, "runs/tiny.launch/job.sbatch"))
    recorder(tmp_path / "srun", tmp_path)
    seen = received(["bash", str(script)], tmp_path)
    llmjax = str(Path(sys.executable).with_name("llmjax"))
    assert seen == [
        *("--cpu-bind=none", "--kill-on-bad-exit=0", "sh", "scripts/launch/train.sh", ODD, llmjax, "train"),
        *("experiments/tiny.py", f"--run-dir={ODD}", "--mesh.data=16", mixer, "--hosts=auto", "--json"),
    ]
    assert not [*tmp_path.rglob("pwned")]


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_batch_script_asks_for_a_task_a_gpu_and_comes_back(checkout):
    extra = ["--partition=gpu", "--account=me", "--time=12:00:00"]
    out = checkout.launch(*SLURM, *extra, "--dry-run").out
    script = written(out, "runs/tiny.launch/job.sbatch")
    documented = {w for line in (HERE / "sbatch_options.txt").read_text().splitlines()[1:] for w in line.split()}
    found = options(script)
    assert set(found) <= documented
    assert found | {"output": ""} == {
        "job-name": "tiny",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "mem": "0",
        "exclusive": "",
        "partition": "gpu",
        "account": "me",
        "time": "12:00:00",
        "requeue": "",
        "signal": "TERM@120",
        "open-mode": "append",
        "output": "",
    }
    body = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert script.index("#SBATCH --output") < script.index(body[0])
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_the_batch_job_goes_back_into_the_queue_only_where_it_was_stopped(code, requeued, checkout, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(written(checkout.launch(*SLURM, "--dry-run").out, "runs/tiny.launch/job.sbatch"))
    recorder(tmp_path / "scontrol", tmp_path)
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    assert subprocess.run(["bash", str(script)], env=environment, check=False).returncode == code
    seen = tmp_path / "seen.txt"
    assert (seen.read_text() if seen.exists() else "") == ("requeue\x0042\x00" if requeued else "")


# ---- the manifest ----------------------------------------------------------------------------------------------------


def manifest(checkout, *words: str) -> dict:
    out = checkout.launch(*GKE, *words, "--dry-run").out
    return json.loads(written(out, "runs/tiny.launch/jobset.json"))


SCHEMA = json.loads((HERE / "jobset_schema.json").read_text())


def test_the_manifest_is_a_jobset_of_one_pod_a_host(checkout):
    found = manifest(checkout, "--spot")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA)
    (jobs,) = found["spec"]["replicatedJobs"]
    job, pod = jobs["template"]["spec"], jobs["template"]["spec"]["template"]["spec"]
    assert (jobs["replicas"], job["completions"], job["parallelism"], job["backoffLimit"]) == (1, 64, 64, 0)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["restartPolicy"] == "Never"  # a failure policy of pods demands it
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    (rule,) = (rule for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule)
    assert rule["onExitCodes"]["containerName"] == container["name"]
    longest = f"{found['metadata']['name']}-{jobs['name']}-{jobs['replicas'] - 1}-{job['completions'] - 1}-abcde"
    assert len(longest) <= 63


def test_the_image_is_made_of_the_archive(checkout):
    """What the Dockerfile adds is in the folder that docker is given."""
    assert checkout.launch(*GKE).code == 0
    (build,) = (argv for argv in checkout.calls() if argv[:2] == ["docker", "build"])
    (file,) = (word.removeprefix("--file=") for word in build if word.startswith("--file="))
    (added,) = (line.split()[1] for line in Path(file).read_text().splitlines() if line.startswith("ADD "))
    assert tarfile.is_tarfile(Path(build[-1], added))


def test_slices_are_replicas(checkout):
    words = ["--mesh.slices=2", "--mesh.data=512"]
    (jobs,) = manifest(checkout, *words)["spec"]["replicatedJobs"]
    assert (jobs["replicas"], jobs["template"]["spec"]["completions"]) == (2, 64)


def test_kubernetes_gives_the_words_back_as_they_were(checkout):
    """Kubernetes replaces $(NAME) in a command, and $$ by one dollar where that keeps a $(NAME) from it."""
    (jobs,) = manifest(checkout, f"--run-dir=/shared/{ODD}")["spec"]["replicatedJobs"]
    (container,) = jobs["template"]["spec"]["template"]["spec"]["containers"]
    assert f"--run-dir=/shared/{ODD}" in [word.replace("$$(", "$(") for word in container["command"]]
    assert not [word for word in container["command"] if "$(" in word.replace("$$(", "")]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestarts"), "10"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeSelector", "a"), 4),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "ports"), [{}]),
    ],
)
def test_the_schema_refuses_what_the_cluster_would(path, value, checkout):
    found = manifest(checkout)
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, SCHEMA)


# ---- wrong requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("experiments/tiny.py", "--on=tpupod", "--name=a", "--target=cpu:1"), "is no place: did you mean tpu-pod?"),
        (
            ("experiments/tiny.py", "--on=aws", "--name=a", "--target=cpu:1"),
            "--on=aws is no place: there are box, gke,",
        ),
        ((*BOX, "--zone=x"), "--zone is no option of box: it takes none"),
        ((*SLURM, "--spot"), "--spot is no option of slurm: it takes --partition, --account, --time"),
        ((*SLURM, "--partition=a b"), "--partition='a b' is not one plain word"),
        ((*BOX[:2], "--name=A", BOX[3]), "--name='A' must be at most 40 lowercase letters"),
        (("nowhere.py", *BOX[1:]), "cannot read the experiment file nowhere.py"),
        ((*BOX, "--train.step=3"), "unknown field train.step: did you mean train.steps?"),
        (
            (*BOX, "--mesh.data=2"),
            "mesh.data=2 makes a mesh of 2 devices (data=2), but target=cpu:1 has 1: use mesh.data=1",
        ),
        ((*POD[:3], "--target=v5p:8x8x8", *POD[4:]), "but target=v5p:8x8x8 has 512: use mesh.data=512"),
        ((*POD[:3], "--target=v5p:4x4x5", *POD[4:]), "the nearest are v5p:4x4x8, v5p:4x4x4, v5p:4x4x12"),
        (POD[:6], "16 hosts share the run directory: give --nfs=SERVER:/EXPORT"),
        ((*POD, "--run-dir=runs/x"), "--run-dir=runs/x is not on the shared file system: use /shared/tiny"),
        ((*POD[:3], "--target=tpu7x:2x4x4", *POD[4:]), "the Cloud TPU API has no tpu7x: use --on=gke"),
        ((POD[0], "--on=slurm", *POD[2:6]), "target='v5p:4x4x4' has no GPUs"),
        ((POD[0], "--on=box", *POD[2:6]), "is a TPU slice: use --on=tpu-pod or --on=gke"),
        (("experiments/tiny.py", "--on=box", *SLURM[2:]), "has 2 hosts, a box is one: use --on=slurm"),
        ((*SLURM[:1], "--on=gke", *SLURM[2:]), "is no TPU: use --on=slurm or --on=box"),
        (GKE[:6], "--on=gke needs --image=REGISTRY/NAME:TAG"),
        (GKE[:7], "--on=gke needs --claim=NAME"),
    ],
)
def test_wrong_requests_are_one_line_and_nothing_is_run(words, line, checkout):
    done = checkout.launch(*words)
    assert done.code == 2
    assert line in done.err
    assert len(done.err.splitlines()) == 1
    assert checkout.calls() == []
    assert not (checkout.path / "runs").exists()


def test_it_is_run_in_the_root_of_the_checkout(checkout, monkeypatch):
    monkeypatch.chdir(checkout.path / "experiments")
    done = checkout.launch("tiny.py", *BOX[1:])
    assert done.code == 2
    assert "run llmjax launch in the root of the checkout" in done.err


def test_json_holds_files_commands_and_run_directory(checkout):
    found = json.loads(checkout.launch(*SLURM, "--dry-run", "--json").out.splitlines()[-1])
    assert found["commands"] == [["sbatch", "runs/tiny.launch/job.sbatch"]]
    assert found["files"]["runs/tiny.launch/job.sbatch"].startswith("#!/bin/bash\n")
    assert (found["run_dir"], found["hosts"], found["dry_run"]) == ("runs/tiny", 2, True)
