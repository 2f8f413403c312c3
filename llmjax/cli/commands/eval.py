"""`llmjax eval RUN_DIR`: held-out loss, perplexity, bits per byte and accuracy."""

from argparse import Namespace
from typing import Any

from llmjax.cli.runs import Run, open_run
from llmjax.cli.text import table
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.evaluate import Evaluator
from llmjax.train.state import plan
from llmjax.train.step import Step, apply_of


def run(arguments: Namespace) -> dict[str, Any]:
    """Measure and print; returns `val_<metric>`, `step` and `run_dir`."""
    opened = open_run(arguments.run_dir, arguments.checkpoint, arguments.overrides)
    values = evaluate(opened)
    print(f"{arguments.run_dir}, step {opened.step}, held out")
    print(table([(name.replace("_", " "), f"{value:.4f}") for name, value in values.items()], right=(1,)))
    return {f"val_{name}": value for name, value in values.items()} | {
        "step": opened.step,
        "run_dir": arguments.run_dir,
    }


def evaluate(opened: Run) -> dict[str, float]:
    """The objective's metrics over every held-out token, or over `train.eval_batches` batches of them."""
    experiment, mesh = opened.experiment, MeshConfig().build()
    optimizer = plan(experiment.model, experiment.optimizer, experiment.train, mesh).optimizer
    step = Step(apply_of(experiment.model.build()), experiment.objective, optimizer, experiment.train)
    batches = opened.pipeline.eval_batches(experiment.train.eval_batches)
    return Evaluator(step, mesh)(opened.params, batches)
