"""What a training step takes and returns: one pytree, born sharded, with the layout that checkpoints use."""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from llmjax.nn.model import Model, Params, merged, split
from llmjax.parallel.mesh import replicated, shardings
from llmjax.train.config import Train
from llmjax.train.ema import EmaState
from llmjax.train.loss_scale import LossScaleState


class State(NamedTuple):
    """All that changes from step to step on the devices."""

    params: Params
    """Those that train, float32."""
    opt_state: PyTree
    """The optimizer's own."""
    ema: EmaState | None
    """Average of the parameters, where the run keeps one."""
    loss_scale: LossScaleState | None
    """Where the run scales its loss."""
    bad: Int[Array, ""]
    """Steps in a row, up to the last one, that were skipped; int32."""
    frozen: Params
    """Parameters that the model says do not train, in the form that they are stored in; empty where all do."""

    @property
    def model_params(self) -> Params:
        """The whole tree that the model takes."""
        return merged(self.params, self.frozen)


@dataclass(frozen=True)
class Plan:
    """The state of a run before there is any: its shapes and shardings, and how to make it."""

    model: Model
    optimizer: optax.GradientTransformationExtraArgs
    train: Train
    abstract: State
    """ShapeDtypeStructs that carry their shardings."""

    @property
    def shardings(self) -> State:
        """NamedSharding of every array."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)

    def init(self, seed: int, given: Params | None = None) -> State:
        """Draw the state, each device its own part of it; the same for every mesh.

        Where parameters are `given`, or the model loads some, only the rest is drawn. Raises what `Model.loaded` does.
        """

        def new(key: PRNGKeyArray, given: Params | None) -> State:
            return _new(self.model, self.model.init(key, given), self.optimizer, self.train)

        given = self.model.loaded(self.abstract.model_params) if given is None else given
        make = jax.jit(new, out_shardings=self.shardings, donate_argnums=1)
        return make(jax.random.key(seed), given)


def plan(model: Model, optimizer: Any, train: Train, mesh: Mesh | AbstractMesh) -> Plan:
    """The plan of a run on `mesh`, `optimizer` being its config. No memory is used.

    Raises ConfigError where a path pattern of the optimizer matches no parameter that trains.
    """
    boxed = model.boxed()
    params = meta.unbox(boxed)
    transform = optimizer.build(split(params, model.trains)[0])
    shapes = jax.eval_shape(lambda p: _new(model, p, transform, train), params)
    placed = by_path(shardings(nn.get_partition_spec(boxed), params, mesh))
    sizes = by_path(params)

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = _like_param(path_of(path), leaf, placed, sizes) or replicated(mesh)
        if train.offload_optimizer and path_of(path).startswith("opt_state") and leaf.ndim:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return Plan(model, transform, train, jax.tree_util.tree_map_with_path(place, shapes))


def _new(model: Model, params: Params, optimizer: optax.GradientTransformationExtraArgs, train: Train) -> State:
    loss_scale = train.precision.loss_scale
    trained, frozen = split(params, model.trains)
    return State(
        params=trained,
        opt_state=optimizer.init(trained),
        ema=None if train.ema is None else train.ema.init(trained),
        loss_scale=None if loss_scale is None else loss_scale.init(),
        bad=jnp.zeros((), jnp.int32),
        frozen=frozen,
    )


def _like_param(
    path: str, leaf: jax.ShapeDtypeStruct, placed: dict[str, NamedSharding], sizes: dict[str, jax.ShapeDtypeStruct]
) -> NamedSharding | None:
    """The sharding of the parameter that a leaf (a moment, an average) belongs to: its path ends in the parameter's."""
    parts = path.split("/")
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    name = next((tail for tail in tails if tail in placed), None)
    return placed[name] if name is not None and sizes[name].shape == leaf.shape else None


def path_of(path: Any) -> str:
    """A key path as text, `blocks/0/mixer/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, in path order."""
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return dict(sorted(leaves.items()))


def params_sha256(params: Params) -> str:
    """SHA-256, in hex, over the bytes of all parameters (row-major, little-endian), one after another in path order."""
    digest = hashlib.sha256()
    for leaf in by_path(params).values():
        array = np.asarray(leaf)
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
