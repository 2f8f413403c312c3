"""Calibration: what the inputs of every projection look like on some batches, read by an interceptor.

Kept are sums that do not grow with the data: the second moments E[x x^T], the mean and the largest of |x|. Projections
of experts are not seen: each reads other tokens.
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from llmjax.config import InputError
from llmjax.nn.linear import Linear
from llmjax.nn.model import Model, Params
from llmjax.nn.sites import CAPTURED
from llmjax.quant.method import Statistics

NAME = "projection_inputs"
Sums = dict[str, Float[Array, "..."]]


def calibrate(
    model: Model, params: Params, batches: Iterable[dict[str, Any]], targets: str = ""
) -> dict[str, Statistics]:
    """Statistics of the inputs of the projections whose path matches `targets`, by path, stacked over repeats.

    A batch holds the arguments of the model's call (`tokens` ...), with no padding: every token counts. Raises
    InputError without a batch.
    """
    total: dict[str, Sums] | None = None
    for batch in batches:
        new = sums(model, targets, params, batch)
        total = new if total is None else {path: add(total[path], new[path]) for path in new}
    if total is None:
        raise InputError("calibration needs at least one batch")
    return {path: statistics(found) for path, found in total.items()}


@partial(jax.jit, static_argnums=(0, 1))
def sums(model: Model, targets: str, params: Params, batch: dict[str, Any]) -> dict[str, Sums]:
    """The sums of one batch, by path."""
    with nn.intercept_methods(partial(watch, re.compile(targets))):
        _, seen = model.build().apply({"params": params}, **batch, mutable=[CAPTURED])
    flat = flatten_dict(seen[CAPTURED], sep="/", is_leaf=lambda path, _: path[-1:] == (NAME,))
    return {path.removesuffix(f"/{NAME}"): found for path, found in flat.items() if path.endswith(f"/{NAME}")}


def watch(
    targets: re.Pattern[str], call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Record the inputs of a Linear, and let it compute."""
    module = context.module
    if isinstance(module, Linear) and context.method_name == "__call__" and targets.search("/".join(module.path)):
        x = jnp.asarray(args[0], jnp.float32)
        x = x.reshape(-1, math.prod(module.inputs))
        module.sow(CAPTURED, NAME, of_rows(x), reduce_fn=add, init_fn=dict)
    return call(*args, **kwargs)


def of_rows(x: Float[Array, "rows inputs"]) -> Sums:
    """Sums of x x^T and |x| over rows, the largest |x|, and how many rows there are."""
    return {
        "gram": jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST),
        "mean": jnp.sum(jnp.abs(x), axis=0),
        "largest": jnp.max(jnp.abs(x), axis=0),
        "rows": jnp.asarray(len(x), jnp.float32),
    }


def add(old: Any, new: Any) -> Sums:
    """Both together; of the largest the larger."""
    if not old:
        return new
    return {name: (jnp.maximum if name == "largest" else jnp.add)(old[name], new[name]) for name in new}


def statistics(found: Sums) -> Statistics:
    """Means from sums."""
    rows = found["rows"]
    return Statistics(found["gram"] / rows[..., None, None], found["mean"] / rows[..., None], found["largest"])


def statistics_of(x: Float[Array, "rows inputs"]) -> Statistics:
    """Of the inputs of one projection."""
    return statistics(of_rows(x))
