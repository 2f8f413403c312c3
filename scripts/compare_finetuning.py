"""Run every variant of experiments/finetune/compare.py and write docs/finetuning.json and docs/finetuning.png.

    python -m scripts.compare_finetuning            all of them, from models/base
    python -m scripts.compare_finetuning lora vera  some of them; the others stay as they were measured

The table in docs/finetuning.md is written from the json file.
"""

import json
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import jax
import matplotlib

from llmjax.experiment import Experiment, load_experiment
from llmjax.nn.model import flat, split
from llmjax.plan.one_device import nbytes
from llmjax.train.log import read_metrics
from llmjax.train.loop import fit
from llmjax.train.state import plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FILE, DOCS = "experiments/finetune/compare.py", Path("docs")
VARIANTS = ("full", "experiment", "qlora", "dora", "pissa", "vera", "bottleneck", "ia3", "norms", "prompt", "prefix")
MARK = "<!-- table -->"


def main(names: list[str]) -> None:
    path = DOCS / "finetuning.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in names or VARIANTS:
        experiment = load_experiment(f"{FILE}:{name}")
        with tempfile.TemporaryDirectory() as folder:
            results[experiment.name] = measured(experiment, Path(folder))
        print(experiment.name, results[experiment.name], flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    page = DOCS / "finetuning.md"
    before, _, rest = page.read_text().partition(MARK)
    after = rest.partition(MARK)[2]
    page.write_text(f"{before}{MARK}\n{table(results)}\n{MARK}{after}")


def measured(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """The held-out curve of a run, and what its parameters and optimizer take."""
    layout = plan(experiment.model, experiment.optimizer, experiment.train, experiment.mesh.build()).abstract
    fit(experiment, folder)
    lines = read_metrics(folder)
    speed = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    curve = {line["step"]: line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line}
    trained = sum(x.size for x in flat(split(experiment.model.abstract(), experiment.model.trains)[0]).values())
    return {
        "trained": trained,
        "parameters": experiment.model.num_params(),
        "frozen_bytes": nbytes(layout.frozen),
        "trained_bytes": 2 * nbytes(layout.params) + nbytes(layout.opt_state),
        "curve": curve,
        "tokens_per_second": sorted(speed)[len(speed) // 2],
        "date": date.today().isoformat(),
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}, CPU",
    }


def table(results: dict[str, Any]) -> str:
    """The page's table."""
    rows = [
        "| variant | trained | held-out bits/byte | frozen, MB | trained, gradients, moments, MB |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        share = f"{found['trained']:,} ({found['trained'] / found['parameters']:.2%})"
        memory = f"{found['frozen_bytes'] / 1e6:.2f} | {found['trained_bytes'] / 1e6:.2f}"
        rows.append(f"| {name} | {share} | {list(found['curve'].values())[-1]:.3f} | {memory} |")
    return "\n".join(rows)


def draw(results: dict[str, Any]) -> None:
    """Held-out bits per byte over what is trained, and over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, found in results.items():
        steps, values = zip(*((int(step), value) for step, value in found["curve"].items()), strict=True)
        left.plot(steps, values, label=name)
        right.plot(found["trained"], values[-1], "o", color=left.lines[-1].get_color())
        right.annotate(name, (found["trained"], values[-1]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    left.set(xlabel="updates", ylabel="held-out bits per byte")
    left.legend(fontsize=8)
    right.set(xlabel="trained parameters", xscale="log")
    figure.savefig(DOCS / "finetuning.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
