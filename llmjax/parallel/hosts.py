"""Several processes as one: how they join, what they agree on before they start, and how one stops them all.

Every process runs the same program on its own devices; what lies between them is jax.distributed. Functions here are
called by all processes in the same order, and cost nothing where there is one.
"""

import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.config import InputError

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""
LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|coordination service|[Bb]arrier")
"""What errors say that come of a lost process."""


def join(hosts: str, host: int | None, coordinator: str | None, seconds: int) -> None:
    """Make this process one of several: `hosts` of them, or as many as the cluster has that jax finds (`auto`).

    Found are Cloud TPU, Slurm, Open MPI and Kubernetes. Comes before anything that asks for devices.

    Raises:
        InputError: arguments that do not fit together, no cluster, or no coordinator within `seconds`.
    """
    where: dict[str, Any] = {} if hosts == "auto" else place(hosts, host, coordinator)
    if coordinator is not None and host:
        reach(coordinator, seconds)
    where |= {"initialization_timeout": seconds, "heartbeat_timeout_seconds": HEARTBEAT}
    try:
        jax.distributed.initialize(**where, shutdown_timeout_seconds=HEARTBEAT)
    except ValueError as error:
        if "should be defined" not in str(error):
            raise
        raise InputError(
            "--hosts=auto: this machine is in no cluster that jax knows (Cloud TPU, Slurm, Open MPI, Kubernetes): "
            "give --hosts=N --host=I --coordinator=HOST:PORT"
        ) from None
    # Of two programs under way at once, Gloo mixes up the messages.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def place(hosts: str, host: int | None, coordinator: str | None) -> dict[str, Any]:
    """The arguments of jax.distributed.initialize; raises InputError where one is wrong or missing."""
    if not hosts.isdecimal() or int(hosts) < 1:
        raise InputError(f"--hosts={hosts}: expected auto, or the number of processes")
    if host is None or not 0 <= host < int(hosts):
        raise InputError(f"--host={host}: expected this process's number, 0 to {int(hosts) - 1}")
    if coordinator is None or not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(f"--coordinator={coordinator}: expected HOST:PORT, an address of process 0 with a free port")
    return {"coordinator_address": coordinator, "num_processes": int(hosts), "process_id": host}


def reach(coordinator: str, seconds: float) -> None:
    """Return when process 0 listens; InputError where it does not in time, for which jax would abort the process."""
    address, _, port = coordinator.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > until:
            raise InputError(
                f"--coordinator={coordinator} cannot be reached in {seconds} s ({reason}): start process 0, with the "
                "same --hosts and --coordinator, or wait longer with --join-seconds"
            )
        time.sleep(0.5)


def several() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def told(value: Any) -> Any:
    """What process 0 calls this with, in every process; JSON must be able to say it."""
    if not several():
        return value
    text = json.dumps(value).encode() if first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer)))


def on_first(make: Callable[[], Any]) -> Any:
    """`make()` of process 0, in every process; an exception there is raised there, and as InputError elsewhere."""
    if not several():
        return make()
    failure: Exception | None = None
    result: Any = None
    if first():
        try:
            result = make()
        except Exception as error:
            failure = error
    answer = told({"result": result, "failure": None if failure is None else str(failure)})
    if failure is not None:
        raise failure
    if answer["failure"] is not None:
        raise InputError(f"host 0: {answer['failure']}")
    return answer["result"]


def anywhere(flag: bool) -> bool:
    """Whether `flag` holds in any process."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if several() else flag


def wait(name: str) -> None:
    """Return when every process has come to the wait of this name."""
    if several():
        multihost_utils.sync_global_devices(name)


def require_same(facts: Mapping[str, Any]) -> None:
    """Raise InputError, in every process, where one of these facts is another than in process 0."""
    theirs = told(dict(facts))
    apart = [
        f"{name} is {facts.get(name)!r} on host {jax.process_index()} and {theirs.get(name)!r} on host 0"
        for name in sorted(facts.keys() | theirs.keys())
        if facts.get(name) != theirs.get(name)
    ]
    if anywhere(bool(apart)):
        said = "; ".join(apart[:3]) or "another host differs from host 0, and says in what"
        raise InputError(f"{said}: give all hosts the same experiment and the same installation")


def lost(error: BaseException) -> bool:
    """Whether an error came of a process that is gone."""
    return several() and LOST.search(str(error)) is not None


class Votes:
    """Whether any process wants to stop: asked at each step and answered at the next, so that no step waits."""

    def __init__(self) -> None:
        """Compile nothing where there is one process."""
        self._asked: jax.Array | None = None
        one_each = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.array([one_each[index] for index in sorted(one_each)]), ("hosts",))
        self._mine = NamedSharding(mesh, PartitionSpec("hosts"))
        self._any = jax.jit(lambda wishes: wishes.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, stop: bool) -> bool:
        """Vote; returns the outcome of the vote before, which is the same in every process (of this one: at once)."""
        if not several():
            return stop
        wish = np.array([stop])
        votes = jax.make_array_from_callback((jax.process_count(),), self._mine, lambda index: wish)
        before, self._asked = self._asked, self._any(votes)
        return before is not None and bool(before)
