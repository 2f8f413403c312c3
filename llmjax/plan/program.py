"""The real training step of an experiment, compiled for a target, and what compilers and their texts say."""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from llmjax.experiment import Experiment
from llmjax.parallel.fitting import held
from llmjax.plan.collectives import Collective, axis_of, begins, collectives, ends
from llmjax.plan.hlo import Module
from llmjax.plan.network import place_of, rate
from llmjax.plan.roofline import Terms, terms
from llmjax.plan.target import Target, unknown_topology
from llmjax.plan.work import Work
from llmjax.train.state import plan
from llmjax.train.step import Compiled, Step, apply_of
from pallas_kernels.chips import absent_devices

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def devices_of(target: Target) -> list[jax.Device]:
    """The target's devices; raises InputError where its compiler knows no such slice."""
    if target.chip is None:
        return jax.devices()[: target.chips]
    try:
        return absent_devices(target.text)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
    raise unknown_topology(target)


@dataclass(frozen=True)
class Program:
    """A compiled step."""

    resident: dict[str, int]
    """Bytes on one chip of what stays there from step to step, by class."""
    mesh: Mesh
    executable: Any
    """None where the compiler says that it does not fit."""
    seconds: float
    """Time to trace and compile."""
    available: int
    """Devices of the target, of which the mesh may use fewer."""
    refusal: str = ""
    """Why it does not fit, in the compiler's words."""
    on_host: int = 0
    """Bytes for one chip that stay in its host's memory."""


def compile_step(experiment: Experiment, target: Target) -> Program:
    """Compile the step as the training loop does; raises InputError where the mesh or the target cannot be had."""
    devices = devices_of(target)
    mesh = experiment.mesh.build(devices)
    with experiment.mesh.in_force():
        layout = plan(experiment.model, experiment.optimizer, experiment.train, mesh)
        apply = apply_of(experiment.model.build())
        train = replace(experiment.train, ramp=None)  # what is planned is the whole batch
        step = Step(apply, experiment.objective, layout.optimizer, train, experiment.optimizer.needs_objective)
        state, batch = layout.abstract, experiment.data.empty(experiment.data.batch_size)
        resident = {
            "parameters": held(state.params),
            "frozen": held(state.frozen),
            "optimizer_state": 0 if train.offload_optimizer else held(state.opt_state),
            "ema": held(state.ema),
        }
        on_host = held(state.opt_state) - resident["optimizer_state"]
        program = attempt(lambda: Compiled(step, layout, mesh).compile(batch).executable, resident, mesh, len(devices))
        return replace(program, on_host=on_host)


def attempt(compiled: Callable[[], Any], resident: dict[str, int], mesh: Mesh, available: int) -> Program:
    """The program of an executable that `compiled` makes, or of a compiler that says it does not fit."""
    started, executable, refusal = time.perf_counter(), None, ""
    try:
        executable = compiled()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error)
    return Program(resident, mesh, executable, time.perf_counter() - started, available, refusal)


def needed_bytes(refusal: str) -> int:
    """Bytes of HBM that a compiler would have needed, from its message; 0 where it does not say."""
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {size} of [\d.]+[KMGT]? hbm", refusal) or re.search(
        rf"\({size}\) exceeds available", refusal
    )
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def sent_by(module: Module, target: Target, mesh: Mesh) -> list[tuple[Collective, str, float]]:
    """Each collective with the mesh axes that it runs along and the bytes a second of its group; infinite on a CPU."""
    devices = list(mesh.devices.flat)
    sizes = {name: int(size) for name, size in mesh.shape.items()}
    found = []
    for one in collectives(module, len(devices)):
        speed = float("inf")
        if target.chip is not None:
            places = [place_of(devices[i], target.chip, target.shape) for i in one.group]
            speed = rate(target.chip, target.shape, places)
        found.append((one, axis_of(one.group, sizes), speed))
    return found


def summary(sent: list[tuple[Collective, str, float]]) -> list[dict[str, Any]]:
    """Collectives added up by kind and axis, those that take longest first: bytes and seconds are of each chip."""
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for one, axis, speed in sent:
        row = sums.setdefault(
            (one.kind, axis), {"kind": one.kind, "axis": axis, "count": 0, "bytes": 0, "seconds": 0.0}
        )
        row["count"] += int(one.times)
        row["bytes"] += int(one.times * one.nbytes)
        row["seconds"] += one.times * one.nbytes / speed
    return sorted(sums.values(), key=lambda row: (-row["seconds"], -row["bytes"]))


def roofline(
    module: Module, works: list[Work], sent: list[tuple[Collective, str, float]], target: Target
) -> Terms | None:
    """The terms of the step's time; None on a CPU, whose peaks nobody states."""
    if target.chip is None:
        return None
    return terms(target.chip, works, [(one, speed) for one, _, speed in sent], windows(module))


def windows(module: Module) -> Callable[[str], set[str]]:
    """For each computation, its instructions that stand between the start and the end of a collective."""
    within: dict[str, set[str]] = defaultdict(set)
    for name, body in module.computations.items():
        under_way = 0
        for one in body:
            if begins(module, one):
                under_way += 1
            elif ends(module, one):
                under_way -= 1
            elif under_way > 0:
                within[name].add(one.name)
    return lambda computation: within.get(computation, set())


def blind_loops(module: Module) -> int:
    """Loops whose length the text does not tell: their bodies are counted once."""
    loops = (one for name, _ in module.runs() for one in module.computations.get(name, ()) if one.opcode == "while")
    return sum(module.trips(one) is None for one in loops)
