"""What every model config offers to training, decoding and planning."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llmjax.nn.softmax_mixture import Mixture, log_mixture
from llmjax.nn.stored import Stored

Params = Any
"""A plain pytree of nested dictionaries of arrays."""


@struct.dataclass
class Features:
    """The last hidden states and the head that turns them into logits: soft_cap(hidden @ kernel), or a `mixture`.

    `ahead` are states from which the same head predicts the tokens after the next one. `losses` are terms that layers
    add to the objective's mean loss (summed over layers), `metrics` what they report beside it (means over layers);
    both are empty where no layer has any.
    """

    hidden: Float[Array, "batch length d_model"]
    kernel: Float[Array, "d_model vocab"]
    soft_cap: float | None = struct.field(pytree_node=False, default=None)
    mixture: Mixture | None = None
    ahead: Float[Array, "depth batch length d_model"] | None = None
    losses: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)
    metrics: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """Base of the model configs."""

    rooms: ClassVar[tuple[str, ...]] = ("llmjax.adapters", "llmjax.models", "llmjax.quant")
    """packages above this one that hold models too"""

    def build(self) -> nn.Module:
        """The Linen module."""
        raise NotImplementedError

    def example(self) -> dict[str, Any]:
        """The smallest input that initialises every parameter."""
        return {"tokens": jnp.zeros((1, 1), jnp.int32)}

    def init(self, key: PRNGKeyArray, given: Params | None = None) -> Params:
        """Draw float32 parameters, or complete those that are `given` (see `loaded`)."""
        return draw(self, key) if given is None else given

    def loaded(self, abstract: Params) -> Params | None:
        """Parameters that come from elsewhere, of the dtypes and in the places that `abstract` says.

        `abstract` holds shape structs with shardings, of all of them or of those that are wanted. None of models that
        draw all of theirs.
        """
        return None

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` (`blocks/0/mixer/query/kernel`) is one that training changes."""
        return True

    def boxed(self) -> Params:
        """Abstract parameters that carry the logical names of their axes; no memory is used."""
        module, example = self.build(), self.example()
        return jax.eval_shape(lambda key: module.init(key, **example)["params"], jax.random.key(0))

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters; no memory is used."""
        return meta.unbox(self.boxed())

    def logical_axes(self) -> Params:
        """For each parameter the PartitionSpec of its logical axis names."""
        return nn.get_partition_spec(self.boxed())

    def num_params(self) -> int:
        """Number of parameters, exactly; quantised ones count as what they stand for."""
        return sum(math.prod(leaf.shape) for leaf in flat(self.abstract()).values())

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> Any:
        """Empty decode state for `batch` sequences of up to `length` tokens."""
        raise NotImplementedError

    def generates(self) -> bool:
        """Whether it continues a text from its beginning alone."""
        return True

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs of one training step per token (forward and backward) in sequences of `length`."""
        raise NotImplementedError

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """Bytes of decode state that one more token of context costs."""
        raise NotImplementedError


@dataclass(frozen=True)
class Wrapped(Model, ABC):
    """Base of models made of another one; what they do not change is the other's, its fields among it."""

    base: Model = Model()
    """the model inside"""

    @abstractmethod
    def build(self) -> nn.Module:
        """The Linen module."""

    def __getattr__(self, name: str) -> Any:
        """A field of the model inside, such as `vocab`."""
        if name.startswith("__") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def example(self) -> dict[str, Any]:
        """The base's."""
        return self.base.example()

    def trains(self, path: str) -> bool:
        """What trains of the base."""
        return self.base.trains(path)

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> Any:
        """The base's."""
        return self.base.init_state(batch, length, dtype)

    def generates(self) -> bool:
        """Whether the base does."""
        return self.base.generates()

    def flops_per_token(self, length: int) -> float:
        """The base's."""
        return self.base.flops_per_token(length)

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """The base's."""
        return self.base.kv_bytes_per_token(dtype)


@partial(jax.jit, static_argnums=0)
def draw(model: Model, key: PRNGKeyArray) -> Params:
    """Initial parameters, compiled once for each config."""
    return meta.unbox(model.build().init(key, **model.example())["params"])


def flat(params: Params) -> dict[str, Any]:
    """Parameters by path; those that are stored in another form than an array are one each."""
    return dict(flatten_dict(params, sep="/"))


def unflat(leaves: dict[str, Any]) -> Params:
    """The tree of parameters by path: the inverse of `flat`."""
    return unflatten_dict(leaves, sep="/")


def split(params: Params, here: Callable[[str], bool]) -> tuple[Params, Params]:
    """The parameters whose path is `here`, and the others."""
    leaves = flat(params)
    mine = {path: x for path, x in leaves.items() if here(path)}
    return unflat(mine), unflat({path: x for path, x in leaves.items() if path not in mine})


def merged(some: Params, others: Params) -> Params:
    """The tree that holds both: the inverse of `split`."""
    return unflat(flat(some) | flat(others)) if others else some


def cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """The tree with its floating-point leaves in `dtype`; every other leaf as it is.

    Stored parameters stay as they are stored, and are handed out in `dtype`.
    """

    def one(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Stored))


def readout(features: Features) -> Float[Array, "batch length vocab"]:
    """soft_cap(hidden @ kernel) in float32; of a mixture the log-probabilities, which are logits too."""
    if features.mixture is not None:
        return log_mixture(features.hidden, features.kernel, features.mixture, features.soft_cap)
    logits = jnp.einsum("bld,dv->blv", features.hidden, features.kernel, preferred_element_type=jnp.float32)
    if features.soft_cap is None:
        return logits
    return features.soft_cap * jnp.tanh(logits / features.soft_cap)
