"""What every adapter shares: a config that finds calls of a model's modules and changes what they return.

The model never hears of it. While the model runs, its methods are intercepted (`flax.linen.intercept_methods`); an
adapter's parameters stand in the model's tree beside what they change, at `<path of the module>/adapters/<name>/`, are
stacked over scanned layers with it and split over devices by the same logical names.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.model import Features, Model
from llmjax.nn.projections import Projection, projection_of, projections
from llmjax.nn.stored import Stored

ADAPTERS = "adapters"
"""Name under which a module's adapters stand in the tree of parameters."""

FRESH = "fresh"
"""Key of a decode state that no call has seen yet, where adapters put something before the first token."""

Boxes = dict[str, Any]
"""Arrays by name, each with the logical names of its axes (`boxed`)."""

PRESETS = {
    "all-linear": r"^blocks/",
    "attention": r"/(query|key|value|out)$",
    "qv": r"/(query|value)$",
    "q": r"/query$",
    "mlp": r"/mlp/",
}
"""Names for patterns of projections (Hu et al. 2021, 2106.09685, section 7.1; QLoRA, 2305.14314, all linear layers)."""


def boxed(value: Float[Array, "..."], *axes: str | None) -> nn.LogicallyPartitioned:
    """An array with the logical names of its axes; a name that comes again, as a matrix's own `rank`, counts once."""
    names = (None if axis in axes[:i] else axis for i, axis in enumerate(axes))
    return nn.LogicallyPartitioned(value, tuple(names))


@dataclass(frozen=True)
class Call:
    """A call of a module's method that an adapter may change: its inputs, and how to make it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    make: Callable[..., Any]
    """the call as it stands (adapters before this one included); what is given takes the first arguments' place"""
    params: Any
    """what the adapter drew for this module"""
    shared: Any
    """what the adapter drew for the whole model"""

    def dropout(self, x: Float[Array, "..."], rate: float) -> Float[Array, "..."]:
        """`x` with features dropped in training, 1 / (1 - rate) times what is left."""
        if not rate or not self.module.has_rng("dropout"):
            return x
        kept = jax.random.bernoulli(self.module.make_rng("dropout"), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


@dataclass(frozen=True)
class Adapter(ABC):
    """Base of all methods. A method overrides what it needs of the steps below."""

    name: str = "default"
    """its key in the tree of parameters, and what it is switched on by"""

    @abstractmethod
    def finds(self, module: nn.Module, path: str, method: str) -> bool:
        """Whether it changes calls of that method of the module at `path`."""

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """Its parameters for one module that it finds; the module's own are there."""
        return {}

    def around(self, call: Call) -> Any:
        """What the call returns now."""
        return call.make()

    def draw_shared(self, key: PRNGKeyArray, model: Model) -> Boxes:
        """Its parameters for the whole model, at `adapters/<name>/`."""
        return {}

    def shares(self) -> bool:
        """Whether it has parameters for the whole model."""
        return type(self).draw_shared is not Adapter.draw_shared

    def enter(self, model: Model, inputs: dict[str, Any], shared: Any) -> dict[str, Any]:
        """What the model is given instead of `inputs` (tokens, positions, segment_ids, state, ...)."""
        return inputs

    def leave(self, model: Model, features: Features, given: dict[str, Any]) -> Features:
        """What comes out instead of `features`; `given` is what it was called with."""
        return features

    def slots(self) -> int:
        """Places that it takes up before the first token, in the decode state too (see `begins`)."""
        return 0

    def stateful(self) -> bool:
        """Whether the model runs with a decode state in training too."""
        return False

    def folded(self, params: Any) -> tuple["Adapter", Any]:
        """The method without what only training needs, and the parameters that it has then."""
        return self, params

    def trains(self, leaf: str) -> bool:
        """Whether its parameter of that name trains."""
        return True

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Field and reason for each value that does not fit the model."""
        return iter(())

    def problems(self) -> Iterator[tuple[str, str]]:
        """A name that cannot stand in a path."""
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            yield "name", "must be made of letters, digits, '_', '.' and '-'"


@dataclass(frozen=True)
class ProjectionAdapter(Adapter):
    """Base of methods that change weight matrices: W becomes `weight(W)`, y = x W becomes `output(x, y)`."""

    moves: ClassVar[bool] = False
    """whether it moves a part of the base's matrix into its own when it is drawn"""
    rounds: ClassVar[bool] = False
    """whether it computes the base's outputs in another way even before training, so that the last bits differ"""

    targets: str = "all-linear"
    """which projections: a preset (all-linear, attention, qv, q, mlp) or a regular expression of their paths"""

    def pattern(self) -> str:
        """The regular expression that paths are searched for."""
        return PRESETS.get(self.targets, self.targets)

    def found(self, model: Model) -> dict[str, Projection]:
        """The projections of a model that it changes, by path."""
        return {path: p for path, p in projections(model).items() if re.search(self.pattern(), path)}

    def finds(self, module: nn.Module, path: str, method: str) -> bool:
        """Calls of the projections whose path matches."""
        return method == "__call__" and projection_of(module) is not None and bool(re.search(self.pattern(), path))

    @abstractmethod
    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """The parameters for one matrix `kernel` `[*inputs, *outputs]`."""

    @abstractmethod
    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """The matrix that stands for `kernel` now, of its shape."""

    def bias(self, params: Any, bias: Float[Array, "..."], projection: Projection, shared: Any) -> Float[Array, "..."]:
        """The bias that stands for `bias` now, for merging: of most methods the same."""
        return bias

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """x W' + b, by way of the whole matrix unless the method has a cheaper one."""
        count = len(projection.inputs)
        y, kernel = call.make(), kernel_of(call.module, projection)
        change = self.weight(call.params, kernel, projection, call.shared) - kernel
        return y + jnp.tensordot(x, change.astype(x.dtype), axes=count)

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """The parameters for the matrix of a module, or for each expert's."""
        projection = projection_of(module)
        assert projection is not None
        kernel = kernel_of(module, projection)
        if projection.experts is None:
            return self.start(key, projection, kernel)
        keys = jax.random.split(key, projection.experts)
        each = jax.vmap(lambda key, kernel: self.start(key, projection, kernel))(keys, kernel)
        return {name: boxed(box.value, "experts", *box.names) for name, box in each.items()}

    def around(self, call: Call) -> Any:
        """The product with the changed matrix, or of those that hand their matrix out, that matrix."""
        projection = projection_of(call.module)
        assert projection is not None
        if projection.handed:
            return self.weight(call.params, call.make(), projection, call.shared)
        if projection.experts is None:
            return self.output(call, call.args[0], projection)
        given = call.make()
        steps = {"kernel": self.weight, "bias": self.bias}

        def one(params: Any, given: dict[str, Any]) -> dict[str, Any]:
            return {name: steps[name](params, x, projection, call.shared) for name, x in given.items()}

        return jax.vmap(one)(call.params, given)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Targets that are not there."""
        if not self.found(model):
            there = ", ".join(projections(model))
            yield "targets", f"matches no projection: there are {there}; presets are {', '.join(PRESETS)}"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Targets that are neither a preset nor a regular expression."""
        yield from super().problems()
        try:
            re.compile(self.pattern())
        except re.error as error:
            yield "targets", f"is no regular expression ({error}): use for example '/(query|value)$', or all-linear"


def begins(inputs: dict[str, Any]) -> bool:
    """Whether a call's tokens are the first: without a decode state they always are."""
    state = inputs.get("state")
    return state is None or FRESH in state


def unpacked(inputs: dict[str, Any]) -> dict[str, Any]:
    """Rows of one document each, padding known by its positions: what a decode state takes."""
    segment_ids, positions = inputs.get("segment_ids"), inputs.get("positions")
    if segment_ids is None:
        return dict(inputs)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    return {**inputs, "positions": jnp.where(segment_ids < 0, -1, positions), "segment_ids": None}


def kernel_of(module: nn.Module, projection: Projection) -> Float[Array, "..."]:
    """The matrix that a module owns, as an array."""
    value: Any = meta.unbox(module.get_variable("params", projection.leaf))
    return value.dense() if isinstance(value, Stored) else value
