"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): a second moment of n + m numbers for an n x m matrix.

With row means R and column means C of the averaged squared gradients, the second moment is R C^T / mean(R). Applied
to each layer's matrix alone: the factors, the update clipping and the parameter scale of a stacked leaf are those of
its layers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, PyTree

from llmjax.train.optimizers.base import Optimizer, rate_problems
from llmjax.train.optimizers.paths import is_matrix, is_stacked, map_paths, matrix_axes


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Gradient over a factored root mean square, its RMS clipped, times the RMS of the parameter.

    The learning rate is relative to the parameters' RMS, so it is larger than Adam's: the paper's is min(0.01, 1 /
    sqrt(step)).
    """

    weight_decay: float = 0.0
    """Pull of the parameters towards zero, times the learning rate."""
    decay: float = 0.8
    """The decay rate of the second moment at step t is 1 - t ** -decay."""
    eps: float = 1e-30
    """Added to the squared gradients."""
    update_clip: float = 1.0
    """Largest RMS of a matrix's update before it is scaled; at least 1."""
    relative: bool = True
    """Multiply each update by the RMS of its parameter (at least 1e-3)."""
    momentum: float = 0.0
    """Decay rate of an average of the updates; 0, the paper's memory-saving choice, keeps none."""
    factor_from: int = 128
    """Matrices with both sides at least this long are factored; smaller ones keep a full second moment."""

    def direction(self) -> optax.GradientTransformation:
        """Factored scaling, clipping and parameter scale, per matrix."""
        parts = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay, epsilon=self.eps, min_dim_size_to_factor=self.factor_from
            ),
            optax.clip_by_block_rms(self.update_clip),
        ]
        if self.relative:
            parts.append(optax.scale_by_param_block_rms())
        if self.momentum:
            parts.append(optax.ema(self.momentum, debias=False))
        return per_matrix(optax.chain(*parts))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "momentum")
        if not 0 < self.decay <= 1:
            yield "decay", "is not in (0, 1]: use for example 0.8"
        if not self.eps > 0:
            yield "eps", "is not positive: use for example 1e-30"
        if self.update_clip < 1:
            yield "update_clip", "is below 1, which would shrink every update: use at least 1.0"
        if self.factor_from < 1:
            yield "factor_from", "is below 1: use for example 128"


def per_matrix(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply `inner` to each parameter of each layer alone, kernels seen as matrices `[inputs, outputs]`.

    The state is a tree like the parameters, holding at each stacked leaf the states of its layers, stacked.
    """

    def init_leaf(path: str, param: Float[Array, "..."]) -> PyTree:
        return _each(inner.init, path, param)(_flatten(path, param))

    def update_leaf(
        path: str, update: Float[Array, "..."], state: PyTree, param: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], PyTree]:
        new, state = _each(inner.update, path, param)(_flatten(path, update), state, _flatten(path, param))
        return new.reshape(update.shape), state

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        pairs = map_paths(update_leaf, updates, state, params)
        new = jax.tree.map(lambda _, pair: pair[0], updates, pairs)
        return new, jax.tree.map(lambda _, pair: pair[1], updates, pairs)

    return optax.GradientTransformation(lambda params: map_paths(init_leaf, params), update)


def _each(function: Callable[..., Any], path: str, leaf: Float[Array, "..."]) -> Callable[..., Any]:
    """`function`, mapped over the layers and experts of a leaf."""
    for _ in range(matrix_axes(path, leaf.ndim).inputs[0] if is_matrix(path) else int(is_stacked(path))):
        function = jax.vmap(function)
    return function


def _flatten(path: str, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
    """A kernel as `[*layers, *experts, inputs, outputs]`; the table keeps inputs before outputs, so no axis moves."""
    if not is_matrix(path):
        return leaf
    axes = matrix_axes(path, leaf.ndim)
    sides = (math.prod(leaf.shape[i] for i in group) for group in axes)
    return leaf.reshape(leaf.shape[: axes.inputs[0]] + tuple(sides))
