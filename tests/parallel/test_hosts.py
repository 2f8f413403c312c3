"""What one process says to wrong requests for several; `tests/multiprocess` starts several."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from llmjax.cli import main
from llmjax.config import InputError
from llmjax.parallel import hosts

WRONG = {
    ("many", 0, "here:1"): "--hosts=many: expected auto, or the number of processes",
    ("0", 0, "here:1"): "--hosts=0: expected auto, or the number of processes",
    ("4", None, "here:1"): "--host=None: expected this process's number, 0 to 3",
    ("4", 4, "here:1"): "--host=4: expected this process's number, 0 to 3",
    ("4", 1, None): "--coordinator=None: expected HOST:PORT",
    ("4", 1, "here"): "--coordinator=here: expected HOST:PORT",
}


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_arguments_that_do_not_fit_together(arguments):
    with pytest.raises(InputError, match=re.escape(WRONG[arguments])):
        hosts.join(*arguments, seconds=1)


def test_a_machine_in_no_cluster():
    """In a process of its own: jax looks for clusters only before it has looked for devices."""
    cluster = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(cluster)}
    command = [sys.executable, "-c", "from llmjax.parallel import hosts; hosts.join('auto', None, None, 1)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "InputError: --hosts=auto: this machine is in no cluster that jax knows" in done.stderr


def test_a_coordinator_that_does_not_listen():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        address, start = f"localhost:{taken.getsockname()[1]}", time.monotonic()
        with pytest.raises(InputError, match=f"--coordinator={address} cannot be reached in 1 s"):
            hosts.join("2", 1, address, seconds=1)
        assert 1 <= time.monotonic() - start < 10


def test_one_process_needs_nobody():
    """Nothing is compiled and nothing asked; a stop is a stop at once."""
    assert (hosts.several(), hosts.first(), hosts.anywhere(True), hosts.told((1, "a"))) == (False, True, True, (1, "a"))
    votes = hosts.Votes()
    assert [votes.cast(wish) for wish in (False, True)] == [False, True]
    hosts.require_same({"a": 1})
    assert not hosts.lost(RuntimeError("Gloo all-reduce failed: Connection closed by peer"))


def test_a_host_without_a_number_of_hosts(capsys):
    assert main(["train", "experiments/tiny.py", "--host=1"]) == 2
    assert "--host and --coordinator go with --hosts" in capsys.readouterr().err
