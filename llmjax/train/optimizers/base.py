"""What all optimizers share: clipping, weight decay, parameter groups, and the learning rate as an argument of the
step.

An update is built in this order: gradients of the parameters that train, global-norm clip, `direction` (what a method
is), weight decay, learning rate. Settings differ between parameters by path, so one method with one state serves all
groups:

    update_i = -lr * multiplier_i * (direction(g)_i + weight_decay_i * params_i)

Where a method's weight decay is L2 (`decay_is_l2`), weight_decay_i * params_i joins the clipped gradient before
`direction` instead. The two are the same only for plain SGD (Loshchilov and Hutter 2017, arXiv:1711.05101). Weight
decay is always multiplied by the learning rate, as in PyTorch and optax; the paper multiplies it by the schedule
alone.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from llmjax.config import ConfigError
from llmjax.train.optimizers.paths import STEPS, by_path, is_stacked, map_paths, matching, regex_problem
from llmjax.train.schedules import Cosine, Schedule

NO_DECAY = r"(^|/)(bias|scale)$"


@dataclass(frozen=True)
class Group:
    """Settings of the parameters whose path matches; where several groups match, the first one counts."""

    path: str = ""
    """Regular expression searched for in parameter paths such as `blocks/0/mixer/query/kernel`."""
    learning_rate: float = 1.0
    """Multiple of the learning rate."""
    weight_decay: float | None = None
    """Weight decay of the group; None for the optimizer's. Paths in `no_decay` have none in any case."""
    frozen: bool = False
    """Never change these parameters and keep no optimizer state for them."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if why := regex_problem(self.path):
            yield "path", why
        if self.learning_rate < 0:
            yield "learning_rate", "is negative: it multiplies the optimizer's learning rate, use for example 0.1"
        if self.weight_decay is not None and self.weight_decay < 0:
            yield "weight_decay", "is negative: use 0 for none"
        if self.frozen and (self.learning_rate != 1.0 or self.weight_decay is not None):
            yield "frozen", "leaves learning_rate and weight_decay without effect: drop them or unfreeze the group"


class Setting(NamedTuple):
    """What the groups say of one parameter."""

    multiplier: float | Float[np.ndarray, " layers"]
    weight_decay: float
    frozen: bool


@dataclass(frozen=True)
class Optimizer(ABC):
    """Base of all optimizers: a method is a subclass with its own fields and `direction`."""

    schedule: Schedule = Cosine()
    """Learning rate by step."""
    weight_decay: float = 0.1
    """Pull of the parameters towards zero, times the learning rate."""
    no_decay: str = NO_DECAY
    """Regular expression of the parameter paths without weight decay; empty for none."""
    groups: tuple[Group, ...] = ()
    """Parameters, by path, with a learning rate or weight decay of their own, or frozen."""
    clip: float | None = 1.0
    """Largest global norm of the trained parameters' gradients, which are scaled down to it; None for no clipping."""
    layer_decay: float = 1.0
    """Factor on the learning rate per layer below the last (Howard 2018, arXiv:1801.06146): layer l of L learns with
    layer_decay ** (L - l), embeddings with layer_decay ** L."""

    decay_is_l2: ClassVar[bool] = False
    """Whether weight decay is part of the gradient rather than of the update."""
    needs_objective: ClassVar[bool] = False
    """Whether `update` must also be given `obj_fn=`, the loss of the current batch as a function of the parameters
    alone."""

    def build(self, params: PyTree) -> optax.GradientTransformationExtraArgs:
        """The optimizer of `params` (arrays or shape structs), its learning rate held in its state.

        The rate starts at zero: call `set_learning_rate` before each update. Raises ConfigError where a path pattern
        matches no parameter.
        """
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        self.settings(shapes)
        make = optax.inject_hyperparams(
            lambda learning_rate: self.transform(learning_rate, shapes), hyperparam_dtype=jnp.dtype("float32")
        )
        return make(learning_rate=0.0)

    def transform(
        self, learning_rate: float | Float[Array, ""], params: PyTree
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of `params` (arrays or shape structs) at a learning rate that may be traced."""
        settings = self.settings(params)
        trained = self.rule(learning_rate, settings)
        if self.clip is not None:
            trained = optax.chain(optax.clip_by_global_norm(self.clip), trained)
        return optax.partition(
            {"trained": trained, "frozen": optax.set_to_zero(), "step": optax.scale(-1.0)},
            map_paths(lambda path, _: kind_of(path, settings[path]), params),
        )

    def rule(
        self, learning_rate: float | Float[Array, ""], settings: dict[str, Setting]
    ) -> optax.GradientTransformation:
        """From clipped gradients of the trained parameters to their updates."""
        decay, direction = _add_decay(settings), self.direction()
        parts = (decay, direction) if self.decay_is_l2 else (direction, decay)
        return optax.chain(*parts, _descend(learning_rate, settings))

    @abstractmethod
    def direction(self) -> optax.GradientTransformation:
        """From gradients to the (ascent) direction that the method takes, before weight decay and learning rate."""

    def eval_params(self, opt_state: PyTree, params: PyTree) -> PyTree:
        """The parameters to evaluate and sample with: `params`, unless the method averages its iterates."""
        del opt_state
        return params

    def settings(self, params: PyTree) -> dict[str, Setting]:
        """What the groups say, by parameter path; raises ConfigError for a pattern without effect."""
        shapes = by_path(params)
        # A model without norms and biases is no mistake, so the default alone may match nothing.
        required = "" if self.no_decay == NO_DECAY else "optimizer.no_decay"
        undecayed = matching(self.no_decay, shapes, required) if self.no_decay else set()
        group_of: dict[str, Group] = {}
        for index, group in enumerate(self.groups):
            field = f"optimizer.groups.{index}.path"
            taken = matching(group.path, shapes, field) - set(group_of)
            if not taken:
                raise ConfigError(
                    f"{field}={group.path!r} matches only parameters of earlier groups: put it before them"
                )
            group_of.update(dict.fromkeys(taken, group))
        depth = _layer_factors(self.layer_decay, {path: leaf.shape for path, leaf in shapes.items()})
        result = {}
        for path in shapes:
            group = group_of.get(path, Group())
            decay = self.weight_decay if group.weight_decay is None else group.weight_decay
            decay = 0.0 if path in undecayed else decay
            result[path] = Setting(group.learning_rate * depth[path], decay, group.frozen)
        return result

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if self.weight_decay < 0:
            yield "weight_decay", "is negative: use 0 for none"
        if why := regex_problem(self.no_decay):
            yield "no_decay", why
        if self.clip is not None and not self.clip > 0:
            yield "clip", "is not positive: use for example 1.0, or None for no clipping"
        if not 0 < self.layer_decay <= 1:
            yield "layer_decay", "is not in (0, 1]: use 1.0 for the same learning rate in every layer"


def kind_of(path: str, setting: Setting) -> str:
    """How a parameter is updated: "frozen", "trained", or "step", by minus its gradient whatever the method is."""
    if setting.frozen:
        return "frozen"
    return "step" if re.search(STEPS, path) else "trained"


def set_learning_rate(opt_state: PyTree, learning_rate: float | Float[Array, ""]) -> PyTree:
    """The state of an optimizer from `Optimizer.build` with another learning rate (float32, may be traced)."""
    rate = jnp.asarray(learning_rate, jnp.float32)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": rate})


def rate_problems(config: Optimizer, *fields: str) -> Iterator[tuple[str, str]]:
    """A problem for each of the fields (decay rates of running averages) that is not in [0, 1)."""
    for field in fields:
        if not 0 <= getattr(config, field) < 1:
            yield field, "is not in [0, 1): use for example 0.9"


def eps_problems(eps: float) -> Iterator[tuple[str, str]]:
    """A problem when the term that keeps a denominator from zero does not."""
    if not eps > 0:
        yield "eps", "is not positive: use for example 1e-8"


def _add_decay(settings: dict[str, Setting]) -> optax.GradientTransformation:
    """Add weight_decay_i * params_i to each update."""

    def add(path: str, update: Float[Array, "..."], param: Float[Array, "..."]) -> Float[Array, "..."]:
        decay = settings[path].weight_decay
        return update + decay * param if decay else update

    return optax.stateless(lambda updates, params: map_paths(add, updates, params))


def _descend(learning_rate: float | Float[Array, ""], settings: dict[str, Setting]) -> optax.GradientTransformation:
    """Multiply each update by minus the learning rate of its parameter."""

    def descend(path: str, update: Float[Array, "..."]) -> Float[Array, "..."]:
        rate = -learning_rate * jnp.asarray(settings[path].multiplier, jnp.float32)
        return rate.reshape(rate.shape + (1,) * (update.ndim - rate.ndim)) * update

    return optax.stateless(lambda updates, params: map_paths(descend, updates))


def _layer_factors(decay: float, shapes: dict[str, tuple[int, ...]]) -> dict[str, float | Float[np.ndarray, " layers"]]:
    """Learning-rate factor of each parameter by depth: a vector over the layers axis for stacked leaves.

    Layer `repeat * len(pattern) + position` is the leaf `blocks/<position>/...` at index `repeat`.
    """
    if decay == 1.0:
        return dict.fromkeys(shapes, 1.0)
    places = {path: int(path.split("blocks/")[1].split("/")[0]) for path in shapes if is_stacked(path)}
    pattern = max(places.values(), default=-1) + 1
    layers = pattern * max((shapes[path][0] for path in places), default=0)
    factors: dict[str, float | Float[np.ndarray, " layers"]] = {}
    for path, shape in shapes.items():
        if path in places:
            factors[path] = decay ** (layers - 1.0 - (np.arange(shape[0]) * pattern + places[path]))
        else:
            factors[path] = decay**layers if path.startswith("embed/") else 1.0
    return factors
