"""`llmjax show`: what an experiment is and takes, and where a run stands."""

import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

from llmjax.cli.runs import choose
from llmjax.cli.text import megabytes, short, table
from llmjax.config import docs, is_config, to_dict
from llmjax.experiment import Experiment, load_experiment
from llmjax.fields import hints
from llmjax.parallel.fitting import held, whole
from llmjax.parallel.mesh import MeshConfig, group_of, said
from llmjax.parallel.pipeline import bubble_fraction
from llmjax.plan import arithmetic, memory, nbytes, parameters
from llmjax.train.checkpoint import steps
from llmjax.train.state import by_path, params_sha256, plan


def run(arguments: Namespace) -> dict[str, Any]:
    """Print config, parameters, arithmetic and memory; returns them, for a run with `step` and `params_sha256`."""
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    print(config_table(experiment, arguments.docs))
    rows, devices = parameters(experiment.model), placement(experiment)
    print(f"\n{parameter_table(rows, devices['split'])}")
    sums = arithmetic(experiment)
    print("\n" + table(arithmetic_rows(sums), right=(1,)))
    needed = memory(experiment, arguments.compile)
    print("\n" + table([(name.replace("_", " "), megabytes(value)) for name, value in needed.items()], right=(1,)))
    print("activations: what the backward pass of one microbatch keeps, traced: an upper bound; states are exact")
    print(f"\n{placement_text(devices)}")
    found = {
        "config": to_dict(experiment),
        "num_params": sums["num_params"],
        "parameters": [row._asdict() for row in rows],
        "arithmetic": sums,
        "memory": needed,
        "mesh": devices,
    }
    if Path(arguments.experiment).is_dir():
        found |= standing(experiment, arguments.experiment)
    return found


def config_table(experiment: Experiment, with_docs: bool) -> str:
    """A line a leaf: its path, its value and, on demand, its meaning."""
    return table([row if with_docs else row[:2] for row in fields(experiment)])


def fields(node: Any, path: str = "", doc: str = "") -> list[tuple[str, str, str]]:
    """(path, value, meaning) of every field; a component shows the name of its class and, below it, its own fields."""
    if isinstance(node, tuple) and any(map(is_config, node)):
        return [row for i, part in enumerate(node) for row in fields(part, f"{path}.{i}", doc)]
    if not is_config(node):
        return [(path, repr(node), doc)]
    cls: type = type(node)
    meaning, prefix = docs(cls), f"{path}." if path else ""
    own = [(path, cls.__name__, doc)] if path else []
    below = (fields(getattr(node, name), prefix + name, meaning.get(name, "")) for name in hints(cls))
    return [*own, *(row for rows in below for row in rows)]


def parameter_table(rows: list[Any], split: dict[str, list[str]]) -> str:
    """Path, shape, dtype and count of every parameter and, on a mesh, which axes of it are split; and the sum."""

    def shape(row: Any) -> str:
        places = itertools.zip_longest(row.shape, split[row.path], fillvalue="")
        return "x".join(f"{n}({axes})" if axes else f"{n}" for n, axes in places)

    lines = [("parameter", "shape", "dtype", "count")]
    lines += [(row.path, shape(row), row.dtype, f"{row.size:,}") for row in rows]
    lines += [("sum", "", "", f"{sum(row.size for row in rows):,}")]
    return table(lines, right=(3,))


def arithmetic_rows(sums: dict[str, int | float]) -> list[tuple[str, str]]:
    """The arithmetic of a step in words."""
    parts = (
        f", {sums['accumulate']} microbatches of {sums['rows_per_microbatch']} rows" if sums["accumulate"] > 1 else ""
    )
    return [
        ("tokens per step", f"{sums['batch_size']} x {sums['length']} = {sums['tokens_per_step']:,}{parts}"),
        ("tokens in all", f"{sums['tokens_per_step']:,} x {sums['steps']:,} = {sums['total_tokens']:,}"),
        ("parameters", f"{sums['num_params']:,}"),
        ("tokens per parameter", f"{sums['tokens_per_parameter']:.3g}"),
        ("FLOPs per token", f"{short(sums['flops_per_token'])}FLOP"),
        ("FLOPs in all", f"{short(sums['total_flops'])}FLOP"),
    ]


def placement(experiment: Experiment) -> dict[str, Any]:
    """Who lives where on the experiment's mesh, whose devices need not be there; nothing is allocated.

    `split` are the mesh axes of each axis of each parameter; `whole` the axes that are left whole though the table
    would split them.
    """
    config, model = experiment.mesh, experiment.model
    mesh = config.abstract()
    with config.in_force():
        layout = plan(model, experiment.optimizer, experiment.train, mesh)
        left = whole(model.logical_axes(), model.abstract(), mesh)
    state = layout.abstract
    classes = {"parameters": state.params, "frozen": state.frozen, "optimizer_state": state.opt_state, "ema": state.ema}
    return {
        "axes": dict(mesh.shape),
        "devices": mesh.size,
        "bytes": {name: nbytes(tree) for name, tree in classes.items()},
        "bytes_per_device": {name: held(tree) for name, tree in classes.items()},
        "split": {
            path: [",".join(group_of(axes)) for axes in x.sharding.spec]
            for path, x in by_path(state.model_params).items()
        },
        "whole": [entry._asdict() | {"why": entry.why} for entry in left],
        "bubble_fraction": bubble_fraction(config.stage, config.microbatches, config.rounds),
    }


def placement_text(devices: dict[str, Any]) -> str:
    """Bytes on each device by class, what is left whole, and how long stages are idle."""
    parts = said(devices["axes"]) or "one device"
    lines = [
        (f"on each of {devices['devices']} devices ({parts})" if devices["devices"] > 1 else parts, "bytes", "in all")
    ]
    for name, total in devices["bytes"].items():
        if total:
            lines.append((name.replace("_", " "), megabytes(devices["bytes_per_device"][name]), megabytes(total)))
    text = [table(lines, right=(1, 2))]
    places: dict[str, list[str]] = {}
    for entry in devices["whole"]:
        places.setdefault(entry["why"], []).append(f"{entry['path']} (axis {entry['axis']})")
    for why, paths in places.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        text.append(f"{paths[0]}{more}: {why}")
    if devices["axes"]["stage"] > 1:
        text.append(f"bubble: each stage is idle for {devices['bubble_fraction']:.1%} of a pass through the layers")
    return "\n".join(text)


def standing(experiment: Experiment, run_dir: str) -> dict[str, Any]:
    """Print and return where a run stands; `params_sha256` is over the trained parameters in path order."""
    if not steps(run_dir):
        print(f"\n{run_dir} holds no checkpoint yet")
        return {"step": 0, "params_sha256": None, "val_loss": None, "run_dir": run_dir}
    found = choose(run_dir, "last")
    shapes = plan(experiment.model, experiment.optimizer, experiment.train, MeshConfig().build()).abstract.params
    digest = params_sha256(found.params(shapes))
    print(f"\n{run_dir} stands at step {found.step}, parameters sha256 {digest}")
    return {"step": found.step, "params_sha256": digest, "val_loss": found.val_loss, "run_dir": run_dir}
