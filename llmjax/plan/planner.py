"""The plan of an experiment on a target, as plain data."""

import dataclasses
from typing import Any

from llmjax.config import with_
from llmjax.experiment import Experiment
from llmjax.nn.model import Wrapped
from llmjax.plan.advice import advice
from llmjax.plan.chip_memory import verdict
from llmjax.plan.hlo import Module
from llmjax.plan.one_device import arithmetic
from llmjax.plan.program import Program, blind_loops, compile_step, roofline, sent_by, summary
from llmjax.plan.target import Target
from llmjax.plan.work import Work, work
from pallas_kernels.chips import chip_of


def make(experiment: Experiment, target: Target) -> dict[str, Any]:
    """Compile the training step and count. Bytes, seconds and executed FLOPs are those of one chip, model FLOPs of all.

    Raises InputError where the mesh does not fit the target or the compiler knows no such target.
    """
    program, sums = compile_step(experiment, target), arithmetic(experiment)
    tokens = sums["tokens_per_step"]
    found = described(program, target, tokens, sums["flops_per_step"])
    found |= {"step": "train", "num_params": sums["num_params"], "total_tokens": sums["total_tokens"]}
    if found["step_seconds"]:
        found["mfu_all_pairs"] = found["mfu"] * flops_all_pairs(experiment) * tokens / sums["flops_per_step"]
    return found | {"advice": advice(experiment, found)}


def described(program: Program, target: Target, tokens: float, flops: float) -> dict[str, Any]:
    """What is said of any program that takes so many tokens at once, for which the model needs so many FLOPs."""
    devices = int(program.mesh.devices.size)
    found: dict[str, Any] = {
        "target": target.text,
        "devices": devices,
        "devices_of_target": program.available,
        "mesh": {name: int(size) for name, size in program.mesh.shape.items()},
        **verdict(program, target),
        "tokens_per_step": tokens,
        "model_flops_per_step": flops,
        "compile_seconds": program.seconds,
        "compiler_says": program.refusal.splitlines()[:1],
        "step_seconds": None,
        "mfu": None,
        "collectives": [],
    }
    if program.executable is not None:
        found |= counted(program, target, tokens / devices)
    if found["step_seconds"] and target.chip is not None:
        found["mfu"] = flops / (found["step_seconds"] * devices * target.chip.flops)
    return found


def flops_all_pairs(experiment: Experiment) -> float:
    """FLOPs a token where causal attention counts every pair, as PaLM (2204.02311) and the older tables do."""
    place, model = "model", experiment.model
    while isinstance(model, Wrapped):
        place, model = f"{place}.base", model.base
    for i, block in enumerate(getattr(model, "pattern", ())):
        if getattr(block.mixer, "causal", False):
            experiment = with_(experiment, f"{place}.pattern.{i}.mixer.causal", False)
    return experiment.model.flops_per_token(experiment.data.length)


def counted(program: Program, target: Target, tokens: float) -> dict[str, Any]:
    """What the compiled text says: executed FLOPs, traffic, collectives, and the roofline's time."""
    module = Module(program.executable.as_text())
    works, sent = list(work(module)), sent_by(module, target, program.mesh)
    found: dict[str, Any] = {
        "executed_flops": sum(one.times * one.flops for one in works),
        "hbm_traffic_bytes": sum(one.times * one.nbytes for one in works),
        "collectives": summary(sent),
        "loops_counted_once": blind_loops(module),
        "compiler": compiler_estimate(program, works),
    }
    timed = roofline(module, works, sent, target)
    if timed is None:
        return found
    return found | {
        "step_seconds": timed.step,
        "terms": dataclasses.asdict(timed),
        "tokens_per_second_per_chip": tokens / timed.step,
    }


def compiler_estimate(program: Program, works: list[Work]) -> dict[str, float | None]:
    """FLOPs and seconds as the compiler adds them up, every loop's body once, and the time of its fusions.

    The latter are the TPU compiler's cycles, as often as each fusion runs; XLA:GPU says nothing for absent GPUs.
    """
    said = program.executable.cost_analysis() or {}
    chip = chip_of(program.mesh.devices.flat[0].device_kind)
    cycles, seconds = sum(one.times * one.cycles for one in works), None
    if cycles and chip is not None and chip.flops_per_cycle is not None:
        seconds = cycles * chip.flops_per_cycle / chip.flops
    return {"flops": said.get("flops"), "optimal_seconds": said.get("optimal_seconds"), "fusion_seconds": seconds}
