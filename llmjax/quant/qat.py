"""Training against rounding: a model's parameters, and the inputs of its projections, rounded with gradients as if not.

The tree of parameters stays dense and is what the optimizer updates; `fake_quantised` stands between it and the model.
What the model computes then is what it computes with the tree of `llmjax.quant.quantize` under round-to-nearest.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from llmjax.nn.linear import Linear
from llmjax.nn.model import Model, Params
from llmjax.quant.fake import fake_quantise, noise_penalty
from llmjax.quant.integers import Integer
from llmjax.quant.quantize import Quantize, chosen, layout_of


def fake_quantised(model: Model, params: Params, config: Quantize) -> Params:
    """The parameters, those that `config` names rounded to the nearest, straight through.

    Raises InputError where nothing matches.
    """
    flat = flatten_dict(params, sep="/")
    for path, projection in chosen(model, config).items():
        form, _ = config.choice(path, projection) or (config.format, config.method)
        layout, name = layout_of(projection), f"{path}/{projection.leaf}"
        flat[name] = layout.array(fake_quantise(layout.transposed(flat[name]), form))
    return unflatten_dict(flat, sep="/")


def noise(model: Model, params: Params, config: Quantize, mean: bool = False) -> Float[Array, ""]:
    """Sum over projections of |W - Q(W)|^2 with Q(W) held constant; or its mean over all their weights.

    A regulariser. The two differ by the number of weights: the sum over 10^9 of them swamps a loss.
    """
    flat, total, count = flatten_dict(params, sep="/"), jnp.zeros(()), 0
    for path, projection in chosen(model, config).items():
        form, _ = config.choice(path, projection) or (config.format, config.method)
        w = layout_of(projection).transposed(flat[f"{path}/{projection.leaf}"])
        total, count = total + noise_penalty(w, form), count + w.size
    return total / count if mean else total


def round_inputs(bits: int) -> Callable[..., Any]:
    """An interceptor (`nn.intercept_methods`) that rounds the inputs of every Linear, each token by its own scale."""

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if not isinstance(context.module, Linear) or context.method_name != "__call__":
            return call(*args, **kwargs)
        x, *others = args
        axes = len(context.module.inputs)
        rows = x.reshape(*x.shape[: x.ndim - axes], -1)
        return call(fake_quantise(rows, Integer(bits=bits, block="channel")).reshape(x.shape), *others, **kwargs)

    return interceptor
