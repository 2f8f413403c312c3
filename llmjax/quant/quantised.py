"""A model whose matrices are kept in few bits, for decoding and as the base of adapters (QLoRA: 2305.14314)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.model import Model, Params, Wrapped, flat, unflat
from llmjax.nn.projections import Projection
from llmjax.nn.stored import Stored
from llmjax.parallel.mesh import shardings
from llmjax.quant.quantize import Quantize, chosen, finished, quantise, quantise_parameter
from llmjax.quant.tensor import QTensor


@dataclass(frozen=True)
class Quantised(Wrapped):
    """The base model with the projections that `quantize` names in its format; they do not train.

    Its module is the base's: parameters say themselves how they multiply.
    """

    quantize: Quantize = Quantize()
    """which projections, in which format"""

    def build(self) -> nn.Module:
        """The base's module."""
        return self.base.build()

    def init(self, key: PRNGKeyArray, given: Params | None = None) -> Params:
        """The base's parameters (drawn, or `given`), quantised where they are not yet."""
        if given is None and self.base.loaded({}) is not None:
            given = self.loaded(self.abstract())
        leaves = flat(self.base.init(key, given))
        for name, (path, projection) in self.fixed.items():
            if not isinstance(leaves[name], Stored):
                leaves[name] = quantise_parameter(path, leaves[name], projection, self.quantize)
        return finished(leaves, self.quantize)

    def loaded(self, abstract: Params) -> Params | None:
        """What the base loads, quantised parameter by parameter: one of them is there in full at a time."""
        leaves, fixed = flat(abstract), self.fixed
        rest = self.base.loaded(unflat({name: x for name, x in leaves.items() if name not in fixed}))
        if rest is None:
            return None
        made, dense = flat(rest), flat(placed_like(self.base, abstract))
        for name in leaves.keys() & fixed.keys():
            place = jax.tree.map(lambda x: x.sharding, leaves[name]) if dense[name].sharding else None
            quantised = jax.jit(partial(self.of_dense, name), out_shardings=place)
            made[name] = jax.block_until_ready(quantised(self.parameter(name, dense[name])))
        return unflat(made)

    def parameter(self, name: str, wanted: jax.ShapeDtypeStruct) -> Array:
        """One parameter of a base that loads it."""
        return flat(self.base.loaded(unflat({name: wanted})))[name]

    def of_dense(self, name: str, array: Float[Array, "..."]) -> QTensor | Float[Array, "..."]:
        """A parameter that is quantised, layer by layer: what rounding takes beside it is of one layer."""
        path, projection = self.fixed[name]

        def one(layer: Float[Array, "..."]) -> QTensor | Float[Array, "..."]:
            return quantise_parameter(path, layer, projection, self.quantize)

        return jax.lax.map(one, array) if path.startswith("blocks/") else one(array)

    @cached_property
    def fixed(self) -> dict[str, tuple[str, Projection]]:
        """The projections that are quantised and their paths, by the name of their parameter."""
        return {f"{path}/{p.leaf}": (path, p) for path, p in chosen(self.base, self.quantize).items()}

    def boxed(self) -> Params:
        """Abstract parameters; codes and scales carry the names of the outputs and inputs that they belong to."""
        boxed = self.base.boxed()
        logical, plain = flat(boxed), meta.unbox(boxed)
        leaves = flat(jax.eval_shape(lambda params: quantise(self.base, params, self.quantize), plain))
        found: dict[str, Any] = {}
        for path, leaf in leaves.items():
            if isinstance(leaf, QTensor):
                (place, projection) = self.fixed[path]
                stacked = place.startswith("blocks/")
                found[path] = jax.tree.map(lambda x, p=projection, s=stacked: boxed_part(x, p, s), leaf)
            else:
                found[path] = jax.tree.map(lambda _, leaf=leaf: leaf, logical[path])
        return unflat(found)

    def trains(self, path: str) -> bool:
        """Parameters that are not quantised, as in the base."""
        return path not in self.fixed and self.base.trains(path)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Methods that must see data first, and a base that is quantised already."""
        inside = self.base
        while isinstance(inside, Wrapped):
            if isinstance(inside, Quantised):
                yield "base", "is quantised already: take it as it is"
            inside = inside.base
        methods = {"quantize.method": self.quantize.method}
        methods |= {f"quantize.overrides.{i}.method": o.method for i, o in enumerate(self.quantize.overrides)}
        for field, method in methods.items():
            if method.calibrated():
                yield field, "must see data first (llmjax.quant.quantize.quantise): use RTN here"


def placed_like(model: Model, abstract: Params) -> Params:
    """Shape structs of the model's parameters, sharded over the mesh of those in `abstract`, if over any."""
    boxed = model.boxed()
    shapes = meta.unbox(boxed)
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(abstract) if x.sharding), None)
    if mesh is None:
        return shapes
    where = shardings(nn.get_partition_spec(boxed), shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def boxed_part(x: jax.ShapeDtypeStruct, projection: Projection, stacked: bool) -> nn.LogicallyPartitioned:
    """A part of a quantised tensor with the logical names of its axes: stack, experts, then outputs and inputs.

    Rows that hold the codes of several outputs, and scales of scales, have no names: no device has a part of them.
    """
    lead = ("layers",) * stacked + ("experts",) * (projection.experts is not None)
    rest = x.shape[len(lead) :]
    outputs, inputs = projection.output_axes[0], projection.input_axes[0]
    if len(rest) == 2 and rest[0] > 1:
        return nn.LogicallyPartitioned(x, (*lead, outputs, inputs))
    return nn.LogicallyPartitioned(x, (*lead, *(None,) * len(rest)))
