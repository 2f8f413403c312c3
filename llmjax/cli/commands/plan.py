"""`llmjax plan`: compile a step for chips that are not there, and say what it will take of them."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from llmjax.cli.text import duration, megabytes, short, table
from llmjax.config import InputError
from llmjax.plan.cost import cost
from llmjax.plan.process import plan_of
from llmjax.plan.search import first_that_fits

IN_ALL = (
    "parameters",
    "frozen",
    "optimizer_state",
    "ema",
    "cache",
    "batch_and_padding",
    "temporaries",
    "results",
    "program",
)
"""Classes of memory that add up to what a chip must hold."""


def run(arguments: Namespace) -> dict[str, Any]:
    """Print the plan, with `--search` the plan of the first variant that fits; returns it."""
    if arguments.search and arguments.step != "train":
        raise InputError(f"--search tries variants of training: leave it out, or --step={arguments.step}")
    if arguments.search:
        found = first_that_fits(arguments.experiment, arguments.target, arguments.overrides, print)
    else:
        found = plan_of(arguments.experiment, arguments.target, arguments.overrides, arguments.step)
    found["run"] = whole_run(found, arguments.chip_hour) if arguments.step == "train" else None
    print("\n\n".join(report(found)))
    return found


def whole_run(plan: Mapping[str, Any], hour: float) -> dict[str, float] | None:
    """The bill of all steps, at the price `hour` of a device's hour; None where the time of a step is not known."""
    if not plan["step_seconds"]:
        return None
    rate = plan["tokens_per_step"] / plan["step_seconds"]
    return cost(plan["num_params"], plan["total_tokens"], rate, plan["devices"], hour)._asdict()


def report(plan: Mapping[str, Any]) -> Iterator[str]:
    """The plan in paragraphs."""
    yield verdict(plan)
    yield memory_table(plan)
    if plan["collectives"]:
        yield collectives_table(plan)
    if plan["step_seconds"]:
        yield time_table(plan)
    yield table(counts(plan))
    if plan["advice"]:
        yield "\n".join(["worth trying:", *(f"  {line}" for line in plan["advice"])])


def verdict(plan: Mapping[str, Any]) -> str:
    """The answer in a line or two."""
    mesh = " x ".join(f"{name}={size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    needs, holds = megabytes(plan["hbm_bytes_per_chip"]), megabytes(plan["hbm_limit_bytes"])
    words = "fits" if plan["fits"] else "does NOT fit"
    first = f"{plan['target']}, {mesh} ({plan['devices']} devices): {words}, {needs} of {holds} a device"
    return "\n".join([first, *plan["compiler_says"]])


def memory_table(plan: Mapping[str, Any]) -> str:
    """Bytes a chip by class; gradients and activations are parts of the temporaries."""
    memory = plan["memory"]
    rows = [(name.replace("_", " "), megabytes(memory[name])) for name in IN_ALL if name in memory]
    for name in ("gradients", "activations"):
        if memory.get(name):
            where = "  of the temporaries, " if "temporaries" in memory else ""
            at = next((i + 1 for i, row in enumerate(rows) if row[0] == "temporaries"), len(rows))
            rows.insert(at, (f"{where}{name}", megabytes(memory[name])))
    return table([("memory a device", ""), *rows], right=(1,))


def collectives_table(plan: Mapping[str, Any]) -> str:
    """Collectives by kind and axis: executions, bytes that each device sends, time on its links."""
    rows = [
        (row["kind"], row["axis"], f"{row['count']:,}", megabytes(row["bytes"]), f"{row['seconds']:.4f} s")
        for row in plan["collectives"]
    ]
    return table([("collective", "axis", "count", "sent", "time"), *rows], right=(2, 3, 4))


def time_table(plan: Mapping[str, Any]) -> str:
    """The roofline's terms, and what they make."""
    names = {
        "matmul": "matrix products",
        "kernels": "attention and scan kernels",
        "hbm": "bound by HBM",
        "exposed": "collectives that nothing hides",
    }
    rows = [(label, f"{plan['terms'][name]:.4f} s") for name, label in names.items()]
    rows.append(("step", f"{plan['step_seconds']:.4f} s"))
    rows.append(("tokens a second and device", f"{plan['tokens_per_second_per_chip']:,.0f}"))
    rows.append(("model FLOPs utilisation", f"{plan['mfu']:.1%}"))
    if plan["step"] == "train":
        rows.append(("  with every pair of causal attention", f"{plan['mfu_all_pairs']:.1%}"))
        rows.extend(bill(plan["run"]))
    else:
        rows.append(("tokens a second", f"{plan['tokens_per_step'] / plan['step_seconds']:,.0f}"))
    if "bound" in plan:
        rows.append(("  at most, weights and cache read once", f"{plan['bound']['tokens_per_second']:,.0f}"))
    return table([("estimated time", ""), *rows], right=(1,))


def bill(costs: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """What the whole run takes."""
    yield "the whole run", f"{duration(86400 * costs['days'])}, {costs['chip_hours']:,.2f} device hours"
    if costs["price"]:
        yield "  price", f"{costs['price']:,.2f}"


def counts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """FLOPs, the compiler's own estimate and its time."""
    rows = [
        ("tokens a step", f"{plan['tokens_per_step']:,}"),
        ("parameters", f"{plan['num_params']:,}"),
        ("model FLOPs a step", short(plan["model_flops_per_step"])),
    ]
    if "executed_flops" in plan:
        rows.append(("executed FLOPs a device", short(plan["executed_flops"])))
        rows.append(("HBM traffic a device", megabytes(int(plan["hbm_traffic_bytes"]))))
        said = plan["compiler"]
        if said["flops"]:
            clock = f", {said['optimal_seconds']:.3g} s" if said["optimal_seconds"] else ""
            rows.append(("the compiler's estimate", f"{short(said['flops'])} FLOPs{clock} (loop bodies once)"))
        if said["fusion_seconds"]:
            rows.append(("the compiler's clock of its fusions", f"{said['fusion_seconds']:.3g} s (kernels left out)"))
        if plan["loops_counted_once"]:
            rows.append(("loops of unknown length", f"{plan['loops_counted_once']}, counted once"))
    rows.append(("compile time", f"{plan['compile_seconds']:.1f} s"))
    return rows
