"""The weight matrices of a model that activations are multiplied with: where they are, and which axes they contract."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax

from llmjax.nn.linear import Linear, Matrix
from llmjax.nn.model import Model
from llmjax.nn.moe import Stacked
from llmjax.nn.stack import Table


@dataclass(frozen=True)
class Projection:
    """One weight matrix of a layer: `inputs` are contracted with an activation, `outputs` come out."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    """logical names of the axes of inputs and outputs"""
    leaf: str = "kernel"
    """name of the parameter in its module"""
    experts: int | None = None
    """how many of it stand side by side in a mixture of experts, on an axis in front"""
    table: bool = False
    """whether it is a table of embeddings or a head, whose rows are looked up or which its owner multiplies with"""
    bias: bool = False
    """whether its module has a bias"""
    handed: bool = False
    """whether its module hands the matrix out for its owner to multiply with, as all tables do"""

    @property
    def input_axes(self) -> tuple[str | None, ...]:
        """Logical names of the axes of the inputs."""
        return self.axes[: len(self.inputs)]

    @property
    def output_axes(self) -> tuple[str | None, ...]:
        """Logical names of the axes of the outputs."""
        return self.axes[len(self.inputs) :]


def projection_of(module: nn.Module) -> Projection | None:
    """The projection that a module owns; None of modules that own none."""
    if isinstance(module, Linear):
        return Projection(module.inputs, module.outputs, module.axes, bias=module.bias)
    if isinstance(module, Matrix):
        return Projection(module.inputs, module.outputs, module.axes, handed=True)
    if isinstance(module, Stacked):
        p = module.projection
        return Projection((p.inputs,), (p.outputs,), p.axes, experts=module.experts, bias=p.bias)
    if isinstance(module, Table):
        rows, columns = module.shape
        return Projection((rows,), (columns,), module.axes, leaf=module.label, table=True, handed=True)
    return None


@lru_cache(maxsize=16)
def projections(model: Model) -> dict[str, Projection]:
    """All projections of a model by the path of their module, such as `blocks/0/mixer/query`; no memory is used.

    Under `blocks` a parameter has one more axis in front, the repeats of the pattern.
    """
    found: dict[str, Projection] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        projection = projection_of(context.module)
        if projection is not None and context.method_name == "__call__":
            found["/".join(context.module.path)] = projection
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda key: model.build().init(key, **model.example()), jax.random.key(0))
    return dict(sorted(found.items()))
