"""Where the first bad number is: parameters, inputs, activations in forward order, loss, gradients."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llmjax.nn.model import Model, Params
from llmjax.nn.sites import CAPTURED
from llmjax.objectives.base import Apply, Batch
from llmjax.train.state import State, by_path
from llmjax.train.step import Step, microbatches, run

BLOCKS = "blocks"
"""Everything below it is stacked over the repeats of the pattern."""


def diagnose(step: Step, model: Model, state: State, batch: Mapping[str, Any], seed: int, index: int) -> str:
    """Name the first NaN or infinity that step `index` meets at `state`: what it is, where, and in which layer."""
    key = jax.random.fold_in(jax.random.key(seed), index)
    pattern = len(getattr(model, "pattern", (None,)))
    for found in _findings(step, model.build(), state, dict(batch), key, pattern):
        return found
    return "no bad value was found when the step was run again"


def _findings(
    step: Step, module: nn.Module, state: State, batch: Batch, key: PRNGKeyArray, pattern: int
) -> Iterator[str]:
    for path, value in by_path(state.model_params).items():
        yield from bad("parameter", path, value, pattern)
    params = step.train.precision.cast_compute(state.model_params)
    for path, value in by_path(params).items():
        yield from bad(f"{step.train.precision.compute} copy of parameter", path, value, pattern)
    for name, value in batch.items():
        yield from bad("input", name, value, pattern)
    forward, backward = forward_pass(step, module), jax.jit(step.microbatch)
    for number in range(step.train.accumulate):
        rows = {name: x[number] for name, x in microbatches(batch, step.train.accumulate).items()}
        part = jax.random.fold_in(key, number)
        loss, sites = forward(params, rows, part)
        for path, layer, value in sites:
            yield from bad("activation", path, value, pattern, layer)
        if not np.isfinite(loss):
            yield f"the loss is {loss}, though every activation is finite"
        gradients, _ = backward(state, rows, part)
        for path, value in by_path(gradients).items():
            yield from bad("gradient of parameter", path, value, pattern)


def bad(kind: str, path: str, value: Any, pattern: int, repeat: int | None = None) -> Iterator[str]:
    """A line if an array holds a NaN or an infinity; arrays below `blocks` are stacked unless `repeat` is given."""
    array = np.asarray(value).astype(np.float32)
    if np.isfinite(array).all():
        return
    if path.startswith(f"{BLOCKS}/") and repeat is None:
        repeat = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
        array = array[repeat]
    what = "NaN" if np.isnan(array).any() else "infinity"
    where = "" if repeat is None else f" in layer {repeat * pattern + int(path.split('/')[1])}"
    yield f"{what} in {kind} {path}{where} ({np.sum(~np.isfinite(array))} of {array.size} values)"


Site = tuple[str, int | None, Any]
"""Path, repeat (None outside of the stack), value."""


Order = dict[tuple[str, ...], list[str]]
"""For each module, its sites and children as they came."""


def forward_pass(
    step: Step, module: nn.Module
) -> Callable[[Params, Batch, PRNGKeyArray | None], tuple[Float[Array, ""], list[Site]]]:
    """The objective's loss at parameters in the compute dtype, and all sites of its calls of the model, in order."""
    orders: list[Order] = []

    @jax.jit
    def loss_and_sites(params: Params, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float[Array, ""], list[PyTree]]:
        passes: list[PyTree] = []
        orders.clear()
        loss, _ = step.objective.loss(capturing(module, passes, orders), params, batch, key)
        return loss, passes

    def run(params: Params, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float[Array, ""], list[Site]]:
        loss, passes = loss_and_sites(params, batch, key)
        return loss, [site for sites, order in zip(passes, orders, strict=True) for site in forward_order(sites, order)]

    return run


def capturing(module: nn.Module, passes: list[PyTree], orders: list[Order]) -> Apply:
    """The module as objectives take it; each call appends its sites, and the order they came in."""

    def apply(
        params: Params,
        *inputs: Array,
        key: PRNGKeyArray | None = None,
        method: str = "__call__",
        **named: Array | None,
    ) -> Any:
        order: Order = {}
        with nn.intercept_methods(_record_order(order)):
            (output, _), captured = run(module, params, inputs, named, key, method, [CAPTURED])
        passes.append(captured.get(CAPTURED, {}))
        orders.append(order)
        return output

    return apply


def _record_order(order: Order) -> Callable[..., Any]:
    """Note, for each module, the order in which its sites and children came: jax sorts dictionaries on its way out."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if context.module.scope is not None:
            order[tuple(context.module.path)] = list(context.module.variables.get(CAPTURED, {}))
        return result

    return intercept


def forward_order(sites: PyTree, order: Order) -> Iterator[Site]:
    """The captured sites as they came; a stack repeat by repeat."""
    for path, value in _walk(sites, order, ()):
        if isinstance(value, list):
            for repeat in range(len(value[0][1])):
                yield from ((name, repeat, stacked[repeat]) for name, stacked in value)
        else:
            yield path, None, value


def _walk(sites: Any, order: Order, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Sites by path; a stack as one entry, the list of its sites."""
    for name in sorted(sites, key=lambda n: _rank(n, order.get(path, []))):
        here, value = (*path, name), sites[name]
        if here == (BLOCKS,):
            yield BLOCKS, list(_walk(value, order, here))
        elif isinstance(value, Mapping):
            yield from _walk(value, order, here)
        else:
            yield "/".join(here), value


def _rank(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)
