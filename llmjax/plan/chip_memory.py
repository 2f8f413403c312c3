"""Memory of one chip by class: what stays exactly, from its shardings; what else there is, from the compiler."""

import os
from typing import Any

from llmjax.plan.program import Program, needed_bytes
from llmjax.plan.target import Target


def by_class(program: Program) -> dict[str, int]:
    """Bytes on one chip.

    `gradients` (float32, as the parameters) live during a training step, so that they are a part of `temporaries` and
    not added to them; `activations` are the temporaries beside them. What the compiler says is there only where the
    step compiled.
    """
    found = dict(program.resident)
    gradients = found["parameters"] if "optimizer_state" in found else 0
    if program.executable is None:
        return found | {"gradients": gradients}
    said = program.executable.memory_analysis()
    # XLA on TPU counts what the hosts hold apart, on GPU among all arguments.
    counted = 0 if said.host_argument_size_in_bytes else program.on_host
    found["batch_and_padding"] = said.argument_size_in_bytes - counted - sum(found.values())
    found["temporaries"] = said.temp_size_in_bytes
    found["program"] = said.generated_code_size_in_bytes
    found["results"] = max(said.output_size_in_bytes - said.alias_size_in_bytes, 0)
    total = sum(found.values())
    parts = {"gradients": gradients, "activations": max(said.temp_size_in_bytes - gradients, 0)}
    return found | parts | {"total": total}


def limit(target: Target) -> int:
    """Bytes that a chip may hold; of fake CPU devices each its part of this machine's memory."""
    if target.chip is not None:
        return target.chip.hbm_bytes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // target.chips


def verdict(program: Program, target: Target) -> dict[str, Any]:
    """Whether the step fits, and how much it takes of how much."""
    classes, allowed = by_class(program), limit(target)
    needed = classes.get("total") or needed_bytes(program.refusal)
    return {
        "fits": program.executable is not None and needed <= allowed,
        "hbm_bytes_per_chip": needed,
        "hbm_limit_bytes": allowed,
        "memory": classes,
    }
