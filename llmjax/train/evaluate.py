"""Means of metrics, and held-out evaluation: sums and counts first, division last.

Perplexity is exp of the token NLL and nothing else.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmjax.nn.metric import Metric
from llmjax.nn.model import Params, merged
from llmjax.parallel.mesh import replicated
from llmjax.train.ema import Ema
from llmjax.train.optimizers import Optimizer
from llmjax.train.state import State
from llmjax.train.step import Step

Sums = dict[str, tuple[float, float]]
"""Total and count of each metric in float64: exact through JSON, so that a resumed sum is the uninterrupted one."""


class Evaluator:
    """Evaluates a run's objective without dropout; compiled at the first batch, once."""

    def __init__(self, step: Step, mesh: Mesh) -> None:
        self._mesh = mesh
        self._loss = jax.jit(lambda params, batch: step.loss(params, batch, None)[1], out_shardings=replicated(mesh))

    def __call__(self, params: Params, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Means over all batches (of one process's arrays, or on the devices) at float32 `params`."""
        with jax.set_mesh(self._mesh):  # kernels ask which chips they are traced for, and how many
            pending = [self._loss(params, batch) for batch in batches]
        sums: Sums = {}
        for metrics in jax.device_get(pending):
            add_to(sums, metrics)
        return means(sums)


def averaged(optimizer: Optimizer, ema: Ema | None) -> Callable[[State], Params] | None:
    """From the state to the parameters to evaluate and sample with; None where those are the trained ones.

    `ema` is the config of the average, or None. Before the first update there is no average yet.
    """
    if ema is not None:

        def average(state: State) -> Params:
            if state.ema is None:
                raise ValueError("this state holds no average: it is of a run without one")
            started = state.ema.updates > 0
            average = jax.tree.map(lambda a, p: jnp.where(started, a, p), ema.params(state.ema), state.params)
            return merged(average, state.frozen)

        return average
    if type(optimizer).eval_params is not Optimizer.eval_params:
        return lambda state: merged(optimizer.eval_params(state.opt_state, state.params), state.frozen)
    return None


def add_to(sums: Sums, metrics: Mapping[str, Metric]) -> None:
    """Add the metrics of one more step or batch."""
    for name, metric in metrics.items():
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = (total + float(metric.total), count + float(metric.count))


def means(sums: Sums) -> dict[str, float]:
    """Total over count of each, NaN where nothing was counted; with `perplexity` where there is an `nll`."""
    values = {name: Metric(total, count).mean() for name, (total, count) in sums.items()}
    if "nll" in values:
        values["perplexity"] = math.exp(values["nll"]) if values["nll"] < 700 else math.inf
    return values
