"""Find block sizes for the attention kernels and write them into `pallas_kernels/configs`.

    python -m scripts.tune --estimate v5p     # by the TPU compiler's cycle estimates; needs libtpu, no TPU
    python -m scripts.tune --spills           # which candidates do not fit an H200's registers; needs no GPU
    python -m scripts.tune --minutes 9        # by measuring on the GPU at hand, those left out

Every result is appended to a log as soon as it is known; what stands there is not done again, so a run that was cut off
goes on where it ended. Forward and backward are timed apart, and the best fields of each are joined.
"""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._aot import CompileError, compile_for
from pallas_kernels.attention.mask import Rule, Seen
from pallas_kernels.chips import CHIPS, chip_of
from scripts.timing import interleaved

CONFIGS = Path(__file__).resolve().parent.parent / "pallas_kernels" / "configs"
TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
FORWARD_FIELDS = {"tpu": {"block_q", "block_k", "compute"}, "hopper": {"block_k", "stages"}}
"""The fields of a kernel's Config that its forward pass reads; the backward pass reads the others."""
HEAD_DIMS = ((128, 128), (64, 64), (256, 256), (192, 128))
WIDTH, TOKENS = 2048, 16384
"""Model width and tokens of a measured batch, as in the FlashAttention-3 paper (Shah et al. 2024, 2407.08608)."""
ESTIMATED_HEADS = 2
"""An estimate grows with the grid's steps, and so does its cost: two heads occupy both cores of a v5p."""


Cost = Callable[[dict[str, Any]], tuple[float, str] | None]
"""(number, unit) of a task, or None where there is nothing to log."""


@dataclass(frozen=True)
class Problem:
    """What one entry is for: self-attention in bfloat16 over `length` tokens."""

    length: int
    head_dim: int
    value_dim: int
    causal: bool

    @property
    def rule(self) -> Rule:
        """The usual scale, no window, no soft cap."""
        return Rule(self.head_dim**-0.5, self.causal, None, None)

    def shapes(self, batch: int, heads: int) -> tuple[tuple[int, ...], ...]:
        """Of query, key and value."""
        lead = (batch, self.length, heads)
        return (*lead, self.head_dim), (*lead, self.head_dim), (*lead, self.value_dim)


def program(
    kernel: str, direction: str, problem: dict[str, Any], config: dict[str, Any], batch: int, heads: int
) -> Any:
    """One pass of a kernel as (function, abstract arguments); the arguments are values of JSON.

    The TPU's arrays lie head by head, as its kernels take them: copies are the same for all block sizes.
    """
    module = import_module(f"pallas_kernels.attention.{kernel}")
    given, fields = Problem(**problem), module.Config(**config)
    swap = (lambda x: jnp.swapaxes(x, 1, 2)) if kernel == "tpu" else (lambda x: x)
    abstract = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in given.shapes(batch, heads)]
    query, key, value = (jax.eval_shape(swap, x) for x in abstract)
    seen = Seen(None, None)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, lse = module.forward(swap(q), swap(k), swap(v), None, seen, given.rule, fields)
        return swap(out), lse

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> tuple[jax.Array, ...]:
        lse, delta, d_out = rest
        grads = module.backward(swap(q), swap(k), swap(v), lse, delta, swap(d_out), seen, given.rule, fields)
        return tuple(swap(x) for x in grads)

    if direction == "forward":
        return forward, (query, key, value)
    row = jax.ShapeDtypeStruct((batch, heads, given.length), jnp.float32)
    return backward, (query, key, value, row, row, value)


def estimate(chip: str, task: dict[str, Any]) -> tuple[float, str]:
    """(estimated cycles, unit) of a task on an absent TPU."""
    arguments = {**task, "batch": 1, "heads": ESTIMATED_HEADS}
    report = compile_for(TARGETS[chip], "scripts.tune:program", arguments, report=("cycles",), time_limit=120)
    return report.total_cycles, "cycles"


def check_registers(task: dict[str, Any]) -> None:
    """Raise CompileError where a task on an absent H200 spills registers or has its matrix products serialised."""
    report = compile_for("h200:1x1x1", "scripts.tune:program", {**task, "batch": 1, "heads": 2}, report=("registers",))
    notes = [note for kernel in report.kernels for note in kernel.notes]
    if report.spill_bytes or notes:
        raise CompileError("; ".join([f"spills {report.spill_bytes} bytes a thread", *notes]))


def measure(task: dict[str, Any]) -> tuple[float, str]:
    """(milliseconds, unit) of a task on the device at hand, random data, median of five samples."""
    problem = task["problem"]
    batch, heads = max(1, TOKENS // problem["length"]), WIDTH // problem["head_dim"]
    function, abstract = program(**task, batch=batch, heads=heads)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in abstract]
    if task["direction"] == "backward":  # a log-sum-exp that scores of this size could have
        arrays[3] = jnp.full_like(arrays[3], np.log(problem["length"]) + 0.5)
    jitted = jax.jit(function)
    return 1e3 * float(np.median(interleaved({"": lambda: jitted(*arrays)})[""])), "ms"


def tasks(kernel: str, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """Every distinct forward and backward pass among the kernel's candidates, problem by problem."""
    module = import_module(f"pallas_kernels.attention.{kernel}")
    for problem in problems:
        shapes = problem.shapes(1, WIDTH // problem.head_dim)
        found = module.candidates(*shapes, jnp.dtype(jnp.bfloat16), problem.rule)
        for direction in ("forward", "backward"):
            known = set()
            for config in map(dataclasses.asdict, found):
                mine = tuple(config[name] for name in sorted(fields_of(kernel, direction, config)))
                if mine not in known:
                    known.add(mine)
                    yield dict(kernel=kernel, direction=direction, problem=dataclasses.asdict(problem), config=config)


def fields_of(kernel: str, direction: str, config: dict[str, Any]) -> set[str]:
    """The fields that one pass of a kernel reads."""
    forward = FORWARD_FIELDS[kernel]
    return forward if direction == "forward" else set(config) - forward


def best(todo: list[dict[str, Any]], results: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """An entry for each problem of which every task has a result: the cheapest forward and backward fields joined."""
    known = {name_of(result): result for result in results}
    entries = []
    for kernel, problem in {json.dumps(task["problem"]): (task["kernel"], task["problem"]) for task in todo}.values():
        mine = [known.get(name_of(task)) for task in todo if task["problem"] == problem]
        if None in mine:  # the best may be among those that are still to come
            continue
        passes = []
        for direction in ("forward", "backward"):
            ended = [r for r in mine if r is not None and r["direction"] == direction and r["cost"] is not None]
            passes.append(min(ended, key=lambda r: r["cost"], default=None))
        forward, backward = passes
        if forward is None or backward is None:
            continue
        config = backward["config"] | {name: forward["config"][name] for name in FORWARD_FIELDS[kernel]}
        place = {f"{side}_length": problem["length"] for side in ("query", "key")}
        place |= {name: problem[name] for name in ("head_dim", "value_dim", "causal")}
        cost = {"cost": round(forward["cost"] + backward["cost"], 4), "unit": forward["unit"]}
        found = {"source": source, "date": max(forward["date"], backward["date"])}
        entries.append(
            {"kernel": f"attention_{kernel}", "dtype": "bfloat16"} | place | {"config": config} | cost | found
        )
    return entries


def name_of(task: dict[str, Any]) -> str:
    """What tells a task, or its result, from others."""
    return json.dumps({name: task[name] for name in ("kernel", "direction", "problem", "config")})


def write(chip: str, entries: list[dict[str, Any]]) -> None:
    """Put the entries into the chip's file in place of those for the same problems, one line each."""
    path = CONFIGS / f"{chip}.json"
    place = ("kernel", "dtype", "head_dim", "value_dim", "causal", "query_length", "key_length")
    table = {tuple(e[k] for k in place): e for e in [*json.loads(path.read_text())["entries"], *entries]}
    lines = ",\n".join(f"  {json.dumps(table[key])}" for key in sorted(table))
    path.write_text(f'{{\n "chip": "{chip}",\n "entries": [\n{lines}\n ]\n}}\n')


def fingerprint(kernel: str) -> str:
    """Of the kernel's source files: results for other code do not count."""
    files = sorted((CONFIGS.parent / "attention").glob(f"{kernel}*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def run(log: Path, todo: list[dict[str, Any]], cost: Cost, minutes: float) -> list[dict[str, Any]]:
    """Work through the tasks that the log does not hold, until the time is up; returns all results that hold.

    What `cost` says nothing about is not logged; where it raises, the task is logged as failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines() if log.exists() else []
    results = current([json.loads(line) for line in lines])
    done = {name_of(result) for result in results}
    deadline = time.monotonic() + 60 * minutes
    for task in todo:
        if time.monotonic() > deadline:
            print("time is up: run again to go on")
            break
        if name_of(task) in done:
            continue
        result: dict[str, Any] = task | {"cost": None, "unit": None, "date": datetime.date.today().isoformat()}
        result["code"] = fingerprint(task["kernel"])
        try:
            found = cost(task)
            if found is None:
                continue
            result["cost"], result["unit"] = found
        except (CompileError, ValueError, NotImplementedError, RuntimeError) as error:
            result["error"] = str(error).strip()[-300:]
        with log.open("a") as stream:
            stream.write(json.dumps(result) + "\n")
        results.append(result)
        print(task["direction"], task["problem"], task["config"], result["cost"], result.get("error", ""), flush=True)
    return current(results)


def current(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results for the kernels' source as it is now."""
    return [result for result in results if result["code"] == fingerprint(result["kernel"])]


def main() -> None:
    """Estimate or check for an absent chip, or measure on the GPU at hand; then write the chip's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--estimate", choices=TARGETS, help="a TPU that is not there")
    how.add_argument("--spills", action="store_true", help="log the candidates that an H200 would spill as failed")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 1024])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[dims[0] for dims in HEAD_DIMS])
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this time")
    parser.add_argument("--log", type=Path, help="where results are kept; by default .cache/tune/CHIP.jsonl")
    given = parser.parse_args()
    kernel, source = "hopper", f"measured {jax.devices()[0].device_kind}, jax {jax.__version__}"
    cost: Cost = measure
    here = chip_of("NVIDIA H200" if given.spills else jax.devices()[0].device_kind)
    if given.estimate:
        here = next(chip for chip in CHIPS if chip.name == given.estimate)
        kernel, source = "tpu", f"estimate libtpu {version('libtpu')}"
        cost = functools.partial(estimate, here.name)
    elif given.spills:
        cost = check_registers
    if here is None or (kernel == "hopper" and here.name != "h200"):
        parser.error(f"{jax.devices()[0].device_kind} is no GPU that block sizes are kept for: name a TPU, or --spills")
    dims = [pair for pair in HEAD_DIMS if pair[0] in given.head_dims]
    problems = [Problem(n, *pair, causal) for n in given.lengths for pair in dims for causal in (True, False)]
    log = given.log or Path(".cache/tune") / f"{here.name}.jsonl"
    todo = list(tasks(kernel, problems))
    results = run(log, todo, cost, given.minutes)
    entries = best(todo, results, source)
    if entries:
        write(here.name, entries)
    print(f"{here.name}: {len(entries)} entries from {len(results)} results in {log}")


if __name__ == "__main__":
    main()
