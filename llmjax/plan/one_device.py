"""What a run will take, before it takes it: parameters, arithmetic of a step, bytes. No array is allocated here."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from llmjax.experiment import Experiment
from llmjax.nn.model import Model, Params, merged
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.state import State, by_path, plan
from llmjax.train.step import Compiled, Step, apply_of


class Parameter(NamedTuple):
    """One array of the parameters."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int


def parameters(model: Model) -> list[Parameter]:
    """Every parameter of the model in path order."""
    leaves = by_path(model.abstract()).items()
    return [Parameter(path, leaf.shape, str(leaf.dtype), math.prod(leaf.shape)) for path, leaf in leaves]


def arithmetic(experiment: Experiment) -> dict[str, int | float]:
    """Tokens, parameters and FLOPs of a step and of the run; FLOPs are the model's own (`flops_per_token`)."""
    data, train, model = experiment.data, experiment.train, experiment.model
    tokens = data.batch_size * data.length
    flops = model.flops_per_token(data.length)
    return {
        "batch_size": data.batch_size,
        "length": data.length,
        "accumulate": train.accumulate,
        "rows_per_microbatch": data.batch_size // train.accumulate,
        "tokens_per_step": tokens,
        "steps": train.steps,
        "total_tokens": tokens * train.steps,
        "num_params": model.num_params(),
        "tokens_per_parameter": tokens * train.steps / model.num_params(),
        "flops_per_token": flops,
        "flops_per_step": flops * tokens,
        "total_flops": flops * tokens * train.steps,
    }


def memory(experiment: Experiment, compiled: bool = False) -> dict[str, int]:
    """Bytes on one device that holds everything.

    `parameters` (those that train), `frozen` ones, `gradients`, `optimizer_state` and `ema` are exact. `activations` is
    what the backward pass of one microbatch keeps, traced: an upper bound before fusion. With `compiled` there is
    `compiled_temporary` too: what XLA reserves on this machine's backend beside the state and the batch.
    """
    train, mesh = experiment.train, MeshConfig().build()
    layout = plan(experiment.model, experiment.optimizer, train, mesh)
    step = Step(apply_of(experiment.model.build()), experiment.objective, layout.optimizer, train)
    found = {
        "parameters": nbytes(layout.abstract.params),
        "frozen": nbytes(layout.abstract.frozen),
        "gradients": nbytes(layout.abstract.params),
        "optimizer_state": nbytes(layout.abstract.opt_state),
        "ema": nbytes(layout.abstract.ema),
        "activations": activation_bytes(step, layout.abstract, microbatch(experiment)),
    }
    if compiled:
        whole = experiment.data.empty(experiment.data.batch_size)
        step = dataclasses.replace(step, needs_objective=type(experiment.optimizer).needs_objective)
        analysis = Compiled(step, layout, mesh).compile(whole).executable.memory_analysis()
        found["compiled_temporary"] = analysis.temp_size_in_bytes
    found["kv_cache_per_token"] = experiment.model.kv_bytes_per_token(experiment.generate.cache_dtype)
    return found


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or shape structs) of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def activation_bytes(step: Step, state: State, batch: Mapping[str, Any]) -> int:
    """Bytes that the forward pass of a microbatch hands to the backward pass, the parameters themselves aside."""

    def kept(params: Params, frozen: Params, batch: Mapping[str, Any]) -> Any:
        return jax.vjp(lambda params: step.loss(merged(params, frozen), batch, jax.random.key(0))[0], params)[1]

    jaxpr = jax.make_jaxpr(kept)(state.params, state.frozen, batch).jaxpr
    inputs = {id(var) for var in jaxpr.invars}
    results = {id(var): var.aval for var in jaxpr.outvars if not isinstance(var, Literal)}
    return nbytes([aval for key, aval in results.items() if key not in inputs])


def microbatch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what one forward pass sees."""
    rows = experiment.data.empty(max(experiment.data.batch_size // experiment.train.accumulate, 1))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in rows.items()}
