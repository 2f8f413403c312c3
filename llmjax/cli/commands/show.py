"""`llmjax show`: what an experiment is and takes, and where a run stands."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llmjax.cli.runs import choose
from llmjax.cli.text import megabytes, short, table
from llmjax.config import docs, is_config, to_dict
from llmjax.experiment import Experiment, load_experiment
from llmjax.fields import hints
from llmjax.parallel.mesh import MeshConfig
from llmjax.plan import arithmetic, memory, parameters
from llmjax.train.checkpoint import steps
from llmjax.train.state import params_sha256, plan


def run(arguments: Namespace) -> dict[str, Any]:
    """Print config, parameters, arithmetic and memory; returns them, for a run with `step` and `params_sha256`."""
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    print(config_table(experiment, arguments.docs))
    rows = parameters(experiment.model)
    print(f"\n{parameter_table(rows)}")
    sums = arithmetic(experiment)
    print("\n" + table(arithmetic_rows(sums), right=(1,)))
    needed = memory(experiment, arguments.compile)
    print("\n" + table([(name.replace("_", " "), megabytes(value)) for name, value in needed.items()], right=(1,)))
    print("activations: what the backward pass of one microbatch keeps, traced: an upper bound; states are exact")
    found = {
        "config": to_dict(experiment),
        "num_params": sums["num_params"],
        "parameters": [row._asdict() for row in rows],
        "arithmetic": sums,
        "memory": needed,
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


def parameter_table(rows: list[Any]) -> str:
    """Path, shape, dtype and count of every parameter, and the sum."""
    lines = [("parameter", "shape", "dtype", "count")]
    lines += [(row.path, "x".join(map(str, row.shape)), row.dtype, f"{row.size:,}") for row in rows]
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
