"""Which parameters of a model are quantised, how, and the tree that comes out of it."""

import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from llmjax.config import InputError
from llmjax.nn.model import Model, Params
from llmjax.nn.projections import Projection, projections
from llmjax.nn.stored import Stored
from llmjax.quant.calibrate import calibrate
from llmjax.quant.formats import Format
from llmjax.quant.method import RTN, Method, Statistics
from llmjax.quant.nf4 import NF4
from llmjax.quant.tensor import Layout, QTensor


@dataclass(frozen=True)
class Override:
    """Another choice for some projections."""

    targets: str
    """regular expression that is searched for in the path of a projection, such as `blocks/0/mlp/`"""
    format: Format | None = None
    """their format; None leaves them dense"""
    method: Method = field(default_factory=RTN)
    """how they are rounded"""


@dataclass(frozen=True)
class Quantize:
    """Quantise the projections of a model; embeddings, norms, biases and heads stay dense."""

    format: Format = field(default_factory=lambda: NF4(double=True))
    """number format, block of weights a scale, and whether scales are quantised again"""
    method: Method = field(default_factory=RTN)
    """how weights are rounded; all but round-to-nearest need calibration"""
    targets: str = ""
    """regular expression that is searched for in a projection's path (`blocks/0/mixer/query`); empty for all"""
    exclude: str | None = None
    """regular expression of paths to leave dense"""
    tables: bool = False
    """whether embeddings and heads are quantised too"""
    overrides: tuple[Override, ...] = ()
    """other choices; the first whose targets match counts"""
    activations: int | None = None
    """bits that the inputs of quantised projections are rounded to, each token by its own scale; None for none"""
    rest: Literal["float32", "bfloat16"] = "float32"
    """dtype that the parameters left dense are kept in"""

    def choice(self, path: str, projection: Projection) -> tuple[Format, Method] | None:
        """Format and method of a projection; None where it stays dense."""
        for override in self.overrides:
            if re.search(override.targets, path):
                return None if override.format is None else (override.format, override.method)
        left = projection.table and not self.tables
        if left or not re.search(self.targets, path) or (self.exclude is not None and re.search(self.exclude, path)):
            return None
        return self.format, self.method

    def problems(self) -> Iterator[tuple[str, str]]:
        """Expressions that cannot be read, values out of range."""
        named = [("targets", self.targets), ("exclude", self.exclude or "")]
        named += [(f"overrides.{i}.targets", override.targets) for i, override in enumerate(self.overrides)]
        for name, expression in named:
            try:
                re.compile(expression)
            except re.error as error:
                yield name, f"is not a regular expression: {error}"
        if self.activations is not None and not 2 <= self.activations <= 8:
            yield "activations", "must be 2 to 8 bits, or None"


def quantise(model: Model, params: Params, config: Quantize, seen: Mapping[str, Statistics] | None = None) -> Params:
    """The tree of parameters with quantised tensors in the places of those that `config` names.

    `seen` holds the statistics that the methods need (`llmjax.quant.calibrate`). Under jax.eval_shape no memory is
    used. Raises InputError where nothing matches, or statistics are missing.
    """
    flat = flatten_dict(params, sep="/")
    for path, projection in chosen(model, config).items():
        name = f"{path}/{projection.leaf}"
        flat[name] = quantise_parameter(path, flat[name], projection, config, (seen or {}).get(path))
    return finished(flat, config)


def chosen(model: Model, config: Quantize) -> dict[str, Projection]:
    """The projections that are quantised, by path; raises InputError where there are none."""
    every = projections(model)
    found = {path: projection for path, projection in every.items() if config.choice(path, projection) is not None}
    if not found:
        raise InputError(f"quantisation matches no projection: targets={config.targets!r} among {', '.join(every)}")
    return found


def finished(flat: Mapping[str, Any], config: Quantize) -> Params:
    """The tree of parameters by path, those left dense in the dtype they are kept in."""
    dtype = jnp.dtype(config.rest)
    return unflatten_dict({name: x if isinstance(x, Stored) else x.astype(dtype) for name, x in flat.items()}, sep="/")


def quantise_parameter(
    path: str, array: Float[Array, "..."], projection: Projection, config: Quantize, seen: Statistics | None = None
) -> QTensor | Float[Array, "..."]:
    """One parameter, stacked or not, or the array itself where it stays dense.

    What reads a checkpoint calls this tensor by tensor. Raises InputError where the method needs statistics and there
    are none.
    """
    choice = config.choice(path, projection)
    if choice is None:
        return array
    form, method = choice
    if method.calibrated() and seen is None:
        name = type(method).__name__
        raise InputError(f"{name} needs to see the inputs of {path}: calibrate it, exclude it, or override its method")
    seen = seen if method.calibrated() else None
    return matrices(array, seen, form, method, layout_of(projection), config.activations)


def layout_of(projection: Projection) -> Layout:
    """The axes of a projection's parameter, unstacked."""
    experts = () if projection.experts is None else (projection.experts,)
    return Layout(projection.inputs, projection.outputs, experts)


@partial(jax.jit, static_argnames=("form", "method", "layout", "activations"))
def matrices(
    array: Float[Array, "..."],
    seen: Statistics | None,
    form: Format,
    method: Method,
    layout: Layout,
    activations: int | None = None,
) -> QTensor:
    """Every matrix of a parameter quantised by itself, one after the other."""
    transposed = layout.transposed(array.astype(jnp.float32))
    stack = transposed.shape[:-2]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(stack) :]), (transposed, seen))
    found = jax.lax.map(lambda each: method.quantise(each[0], each[1], form, layout), flat)
    found = jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), found)
    return replace(found, activations=activations)


def layer_by_layer(model: Model, params: Params, config: Quantize, batches: Sequence[dict[str, Any]]) -> Params:
    """As `quantise`, each block calibrated on a model whose earlier blocks are quantised already.

    The model runs over all batches once a block; its parameters stay dense meanwhile, with quantised values.
    """
    found, flat = chosen(model, config), dict(flatten_dict(params, sep="/"))
    done: dict[str, Any] = {}
    layers: dict[str, list[Any]] = {}
    for paths, repeat in turns(found, flat):
        targets = "|".join(f"^{re.escape(path)}$" for path in paths)
        seen = calibrate(model, unflatten_dict(flat, sep="/"), batches, targets)
        for path in paths:
            name, projection, own = f"{path}/{found[path].leaf}", found[path], seen.get(path)
            if repeat is None:
                done[name] = quantise_parameter(path, flat[name], projection, config, own)
                flat[name] = done[name].dense()
                continue
            layer, own = jax.tree.map(operator.itemgetter(repeat), (flat[name], own))
            tensor: Any = quantise_parameter(path, layer, projection, config, own)
            flat[name] = jnp.asarray(flat[name]).at[repeat].set(tensor.dense())
            layers.setdefault(name, []).append(tensor)
    done |= {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors) for name, tensors in layers.items()}
    return finished(flat | done, config)


def turns(found: Mapping[str, Projection], flat: Mapping[str, Any]) -> Iterator[tuple[list[str], int | None]]:
    """The projections that are quantised together, in the model's order, and their repeat; first those in no stack."""
    blocks: dict[str, list[str]] = {}
    for path in found:
        match = re.match(r"(.*\bblocks/\d+)/", path)
        blocks.setdefault(match[1] if match else "", []).append(path)
    if "" in blocks:
        yield blocks.pop(""), None
    for _, places in itertools.groupby(sorted(blocks, key=_place), lambda block: _place(block)[0]):
        order = list(places)
        first = blocks[order[0]][0]
        for repeat in range(len(flat[f"{first}/{found[first].leaf}"])):
            yield from ((blocks[block], repeat) for block in order)


def _place(block: str) -> tuple[str, int]:
    stack, _, index = block.rpartition("/")
    return stack, int(index)
