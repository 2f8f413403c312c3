"""Variants of an experiment in turn, until one fits its target."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llmjax.config import InputError
from llmjax.experiment import Experiment, load_experiment
from llmjax.plan.advice import keeping_less
from llmjax.plan.process import plan_of
from llmjax.plan.target import parse


def first_that_fits(
    experiment: str, target: str, overrides: Sequence[str], report: Callable[[str], None]
) -> dict[str, Any]:
    """The plan of the first variant that fits, with its `overrides`; else the plan of the one that needs least.

    Every variant is compiled in turn and reported in a line; raises InputError where none can be compiled.
    """
    plans: list[dict[str, Any]] = []
    for variant in variants(load_experiment(experiment, overrides), parse(target).chips):
        try:
            found = plan_of(experiment, target, [*overrides, *variant])
        except InputError as error:
            report(f"{' '.join(variant) or 'as it is'}: {error}")
            continue
        found["overrides"] = variant
        needs = found["hbm_bytes_per_chip"] / found["hbm_limit_bytes"]
        report(f"{' '.join(variant) or 'as it is'}: {needs:.0%} of a chip")
        plans.append(found)
        if found["fits"]:
            return found
    if not plans:
        raise InputError(f"no variant of {experiment} can be compiled for {target}")
    return min(plans, key=lambda plan: plan["hbm_bytes_per_chip"])


def variants(experiment: Experiment, chips: int) -> Iterator[list[str]]:
    """Overrides, the least change first: what the backward pass keeps, meshes that split more, microbatches."""
    later = keeping_less(experiment)
    yield []
    for policy in later:
        yield [f"--model.remat={policy}"]
    last = [f"--model.remat={later[-1]}"] if later else []
    for fsdp, tensor in ((chips, 1), (chips // 2, 2), (chips // 4, 4), (chips // 8, 8)):
        if fsdp and fsdp * tensor == chips:
            yield [*last, "--mesh.data=1", f"--mesh.fsdp={fsdp}", f"--mesh.tensor={tensor}"]
    for accumulate in (2, 4, 8):
        if experiment.data.batch_size % (accumulate * experiment.train.accumulate) == 0:
            yield [*last, f"--train.accumulate={accumulate * experiment.train.accumulate}"]
