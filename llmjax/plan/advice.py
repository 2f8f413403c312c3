"""What to change where a step does not fit or waits for the network."""

from collections.abc import Mapping
from typing import Any

from llmjax.experiment import Experiment
from llmjax.parallel.pipeline import POLICIES

TILE = 128
"""Rows of a shard below which XLA:TPU gathers by an all-reduce of zero-padded shards, at twice the traffic or more."""


def advice(experiment: Experiment, plan: Mapping[str, Any]) -> list[str]:
    """Overrides worth trying, the cheapest first; empty where nothing stands out."""
    found = []
    if plan["devices"] < plan["devices_of_target"]:
        found.append(f"--mesh.data=0: the mesh uses {plan['devices']} of {plan['devices_of_target']} devices")
    return [*found, *memory_advice(experiment, plan), *network_advice(experiment, plan)]


def memory_advice(experiment: Experiment, plan: Mapping[str, Any]) -> list[str]:
    """Where it does not fit: split what is whole, recompute what is kept, do in turns what is done at once."""
    if plan["fits"]:
        return []
    found, memory, limit = [], plan["memory"], plan["hbm_limit_bytes"]
    state = memory["parameters"] + memory["optimizer_state"] + memory["ema"] + memory["gradients"]
    if state > limit / 2:
        fsdp = 2 * plan["mesh"]["fsdp"]
        found.append(f"--mesh.fsdp={fsdp}: parameters, optimizer and gradients take {state / limit:.0%} of a chip")
    for remat in keeping_less(experiment)[:1]:
        found.append(f"--model.remat={remat}: keep less for the backward pass")
    parts = plan["mesh"]["data"] * plan["mesh"]["fsdp"]
    rows = experiment.data.batch_size // experiment.train.accumulate // parts
    if rows > 1:
        found.append(f"--train.accumulate={2 * experiment.train.accumulate}: {rows} rows a chip are in memory at once")
    elif plan["mesh"]["context"] * plan["mesh"]["tensor"] == 1:
        found.append("--mesh.context=2 or --mesh.tensor=2: one row is in memory on each chip, split it")
    return found


def keeping_less(experiment: Experiment) -> list[str]:
    """Values of the model's `remat` that keep less for the backward pass than it has, the most first."""
    policies, remat = list(POLICIES), getattr(experiment.model, "remat", None)
    return policies[policies.index(remat) + 1 :] if remat in policies else []


def network_advice(experiment: Experiment, plan: Mapping[str, Any]) -> list[str]:
    """Where the chips wait for each other, and why they might."""
    terms = plan.get("terms")
    if not terms or terms["exposed"] < 0.2 * plan["step_seconds"]:
        return []
    worst, found = plan["collectives"][0], []
    d_model, fsdp = getattr(experiment.model, "d_model", 0), plan["mesh"]["fsdp"]
    if d_model and fsdp > 1 and d_model / fsdp < TILE and worst["kind"] == "all-reduce":
        least = d_model // TILE
        rows = d_model // fsdp
        found.append(f"--mesh.fsdp={least} --mesh.data=0: shards of {rows} rows of d_model gather by all-reduce")
    part = worst["seconds"] / plan["step_seconds"]
    found.append(
        f"{worst['kind']} along {worst['axis']} takes {part:.0%} of the step: more tokens a chip, a smaller axis"
    )
    return found
