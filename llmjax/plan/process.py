"""Start the planner's subprocess and bring back what it found, whatever becomes of it."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmjax.config import InputError
from llmjax.plan.target import Target, parse
from llmjax.train.errors import RunError

ABSENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""No chip is started, none is looked for, and what a compile takes is measured rather than remembered."""


def plan_of(experiment: str, target: str, overrides: Sequence[str], step: str = "train") -> dict[str, Any]:
    """The plan of an experiment file or run directory, compiled in a subprocess.

    `step` is train (`llmjax.plan.planner.make`), decode or prefill (`llmjax.plan.decode.make`). Raises InputError for a
    wrong experiment or target, RunError where the compiler crashes.
    """
    chosen = parse(target)
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name)
        request = {"experiment": experiment, "target": target, "overrides": list(overrides), "step": step}
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "llmjax.plan.child", name]
        options: dict[str, Any] = dict(capture_output=True, text=True, errors="replace")
        done = subprocess.run(command, env=environment(chosen), check=False, **options)
        result = folder / "result.json"
        if not result.exists():
            raise RunError(f"the compiler for {target} ended with code {done.returncode}: {last_words(done.stderr)}")
        found = json.loads(result.read_text())
    if "error" in found:
        raise InputError(found["error"])
    return found


def environment(target: Target) -> dict[str, str]:
    """The child's environment: this one's, but for the device it runs on and the flags of the caller's compiler."""
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    flags = os.environ.get("XLA_FLAGS", "") if target.chip is None else ""
    if target.chip is None:
        kept = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        inherited["XLA_FLAGS"] = f"{kept} --xla_force_host_platform_device_count={target.chips}".strip()
    return inherited | ABSENT


def last_words(errors: str) -> str:
    """The last line of standard error that says something."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not re.match(r"\s*@ +0x", line)]
    return lines[-1][:500] if lines else "it said nothing"
