"""Several real processes on loopback are one run: bit by bit, however it is stopped, on however many it goes on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmjax.experiment import load
from llmjax.parallel.mesh import MeshConfig
from llmjax.train import checkpoint
from llmjax.train.log import read_metrics
from llmjax.train.state import plan
from tests.train.test_resume import lines
from tests.train.tiny import differing

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "tests/multiprocess/experiment.py"
LIMIT = 180
"""Seconds after which a process counts as stuck."""


def free_port():
    """A port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Cluster:
    """`llmjax train` in several processes, one CPU device each (or `devices`); killed when the test is over."""

    def __init__(self):
        self.processes = []

    def start(self, count, run_dir, *arguments, experiment=EXPERIMENT, devices=1, change=None):
        """Begin; `change(host)` are further arguments of one host."""
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "GLIBC_TUNABLES": "",
        }
        port, begun = free_port(), []
        for host in range(count):
            command = [sys.executable, "-m", "llmjax", "train", experiment, f"--run-dir={run_dir}", *arguments]
            if count > 1:
                command += [f"--hosts={count}", f"--host={host}", f"--coordinator=localhost:{port}"]
            command += change(host) if change else []
            begun.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        self.processes += begun
        return begun

    def run(self, *arguments, **options):
        """Begin, wait, and require that all end well; what they print."""
        return [ended(process) for process in self.start(*arguments, **options)]

    def close(self):
        """Kill what is left."""
        for process in self.processes:
            process.kill()
            process.communicate()


def ended(process, code=0):
    """What a process prints until it ends, which it must with this exit code."""
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == code, text[-3000:]
    return text


@pytest.fixture
def cluster():
    found = Cluster()
    yield found
    found.close()


def state(run_dir):
    """The newest checkpoint of a run, on one device."""
    config = load(run_dir)
    target = plan(config.model, config.optimizer, config.train, MeshConfig().build()).abstract
    return checkpoint.newest(run_dir, pytest.fail).state(target)


def wait_for(run_dir, count, processes):
    """Return when so many lines are logged."""
    until = time.monotonic() + LIMIT
    while len(read_metrics(run_dir)) < count:
        for process in processes:
            assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.1)


def test_two_processes_train_the_demo_bit_by_bit_like_one_with_two_devices(cluster, tmp_path):
    demo = {"experiment": "experiments/quickstart.py"}
    changes = ["--mesh.data=0", "--train.steps=2", "--train.eval_every=0", "--train.log_every=1"]
    cluster.run(2, tmp_path / "two", *changes, **demo)
    cluster.run(1, tmp_path / "one", *changes, devices=2, **demo)
    assert differing(state(tmp_path / "two"), state(tmp_path / "one")) == 0
    assert lines(tmp_path / "two") == lines(tmp_path / "one")


def test_four_processes_train_like_one_device(cluster, tmp_path):
    """Sums of four parts in another order: float32 rounding, 1e-5 of each metric."""
    cluster.run(1, tmp_path / "one")
    for variant in ("experiment", "fsdp"):
        cluster.run(4, tmp_path / variant, experiment=f"{EXPERIMENT}:{variant}")
        for mine, its in zip(lines(tmp_path / variant), lines(tmp_path / "one"), strict=True):
            assert mine.keys() == its.keys()
            np.testing.assert_allclose([*mine.values()], [*its.values()], rtol=1e-5)


@pytest.mark.parametrize("stopped", [0, 1])
def test_sigterm_on_any_host_saves_one_step_of_all(cluster, tmp_path, stopped):
    """All exit with 0; half of them go on from there with the same rows, as one that was never stopped does."""
    hosts = cluster.start(2, tmp_path / "run", experiment=f"{EXPERIMENT}:long")
    wait_for(tmp_path / "run", 3, hosts)
    hosts[stopped].send_signal(signal.SIGTERM)
    said = [ended(process) for process in hosts]
    saved = checkpoint.steps(tmp_path / "run")[-1]
    assert f"step {saved} is saved" in said[0]
    steps = saved + 7
    cluster.run(1, tmp_path / "run", f"--train.steps={steps}", experiment=f"{EXPERIMENT}:long")
    cluster.run(1, tmp_path / "whole", f"--train.steps={steps}", experiment=f"{EXPERIMENT}:long", devices=2)
    mine, its = ({line["step"]: line["loss"] for line in lines(tmp_path / name)} for name in ("run", "whole"))
    assert mine.keys() == its.keys()
    assert max(mine) == steps
    np.testing.assert_allclose([*mine.values()], [*its.values()], rtol=1e-5)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_ends_the_others_with_a_message(cluster, tmp_path, killed):
    hosts = cluster.start(2, tmp_path, experiment=f"{EXPERIMENT}:long")
    wait_for(tmp_path, 3, hosts)
    hosts[killed].kill()
    start = time.monotonic()
    text = hosts[1 - killed].communicate(timeout=LIMIT)[0]
    assert time.monotonic() - start < 60
    assert hosts[1 - killed].returncode not in (0, None)
    assert "another host is lost" in text or "JAX distributed service detected fatal errors" in text
    kept = checkpoint.newest(tmp_path, pytest.fail)
    assert kept is None or kept.step % 20 == 0


def test_hosts_with_other_experiments_are_refused(cluster, tmp_path):
    hosts = cluster.start(2, tmp_path / "run", change=lambda host: [f"--model.d_model={32 << host}"])
    said = [ended(process, 2) for process in hosts]
    assert "error: another host differs from host 0" in said[0]
    assert "error: model.d_model is '64' on host 1 and '32' on host 0" in said[1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_bad_input_of_the_first_host_stops_all(cluster, tmp_path):
    (tmp_path / "other").write_text("something else")
    said = [ended(process, 2) for process in cluster.start(2, tmp_path)]
    for text in said:
        assert "holds files but no config.json" in text


def test_a_coordinator_that_cannot_be_reached(cluster, tmp_path):
    """Host 1 of two whose host 0 never comes."""
    begun = cluster.start(2, tmp_path / "run", "--join-seconds=3")
    begun[0].kill()
    assert re.search(r"error: --coordinator=localhost:\d+ cannot be reached in 3 s", ended(begun[1], 2))


READS = """
import json, sys
import numpy as np
from llmjax.data import Bytes, ConcatAndSplit, Data, InMemory
from llmjax.parallel import hosts
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.prefetch import Feed
from tests.train.tiny import tiny
hosts.join(sys.argv[1], int(sys.argv[2]), sys.argv[3], 60)
batches, asked = tiny().data.build(0), []
read = batches.batch
batches.batch = lambda step, rows=None: asked.append((rows.start, rows.stop)) or read(step, rows)
placed = Feed(batches, 8, MeshConfig(data=0).build()).batch(3)["tokens"]
mine = np.concatenate([shard.data for shard in placed.addressable_shards])
right = (mine == read(3)["tokens"][slice(*asked[0])]).all()
print(json.dumps({"asked": asked, "shape": placed.shape, "right": bool(right)}))
hosts.wait("end")
"""


def test_each_host_reads_its_own_rows_only(tmp_path):
    place = f"localhost:{free_port()}"
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", READS, "4", str(host), place],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(4)
    ]
    for host, process in enumerate(begun):
        text, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors[-3000:]
        found = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
        assert found == {"asked": [[2 * host, 2 * host + 2]], "shape": [8, 16], "right": True}
