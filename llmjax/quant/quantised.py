"""A model whose matrices are kept in few bits, for decoding and as the base of adapters (QLoRA: 2305.14314)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PRNGKeyArray

from llmjax.nn.model import Params, Wrapped, flat, unflat
from llmjax.nn.projections import Projection
from llmjax.quant.quantize import Quantize, chosen, quantise
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
        """The base's parameters (drawn, or `given`), quantised."""
        return quantise(self.base, self.base.init(key, given), self.quantize)

    def boxed(self) -> Params:
        """Abstract parameters; codes and scales carry the names of the outputs and inputs that they belong to."""
        logical = flat(self.base.boxed())
        leaves = flat(jax.eval_shape(lambda params: quantise(self.base, params, self.quantize), self.base.abstract()))
        named = chosen(self.base, self.quantize)
        parts = {f"{path}/{p.leaf}": (p, path.startswith("blocks/")) for path, p in named.items()}
        found: dict[str, Any] = {}
        for path, leaf in leaves.items():
            if isinstance(leaf, QTensor):
                projection, stacked = parts[path]
                found[path] = jax.tree.map(lambda x, p=projection, s=stacked: boxed_part(x, p, s), leaf)
            else:
                found[path] = jax.tree.map(lambda _, leaf=leaf: leaf, logical[path])
        return unflat(found)

    def trains(self, path: str) -> bool:
        """Parameters that are not quantised, as in the base."""
        fixed = {f"{place}/{p.leaf}" for place, p in chosen(self.base, self.quantize).items()}
        return path not in fixed and self.base.trains(path)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Methods that must see data first."""
        methods = {"quantize.method": self.quantize.method}
        methods |= {f"quantize.overrides.{i}.method": o.method for i, o in enumerate(self.quantize.overrides)}
        for field, method in methods.items():
            if method.calibrated():
                yield field, "must see data first (llmjax.quant.quantize.quantise): use RTN here"


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
