"""Muon (Jordan 2024): momentum orthogonalised by Newton-Schulz for the matrices of the blocks, Adam for the rest.

Each layer's matrix `[inputs, outputs]` (heads and head_dim fused, layers apart) is orthogonalised alone: see
`paths.matrix_axes`. optax.contrib.muon without such axes would treat stacked kernels with Adam and say nothing.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import optax
from jaxtyping import Array, Float, PyTree

from llmjax.train.optimizers.base import Optimizer, Setting, eps_problems, rate_problems
from llmjax.train.optimizers.paths import (
    by_path,
    is_matrix,
    is_stacked,
    map_paths,
    matching,
    matrix_axes,
    regex_problem,
)


@dataclass(frozen=True)
class Muon(Optimizer):
    """Matrices: U V^T of the momentum U S V^T, times a factor by shape. Others: Adam, decayed like the matrices.

    Kernels under `blocks` are matrices; embeddings, head, norms, biases and all other leaves go to Adam.
    Cost on top of Adam, per matrix with sides m <= n: `steps` * (4 m^2 n + 2 m^3) FLOPs an update.
    """

    momentum: float = 0.95
    """Decay rate of the gradient average that is orthogonalised."""
    nesterov: bool = True
    """Look one step ahead."""
    steps: int = 5
    """Newton-Schulz iterations."""
    preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = "frobenius"
    """How a matrix is scaled before the iteration; `aol` (Boissin 2025, arXiv:2512.04632) does in 4 steps about what
    `frobenius` does in 5."""
    rms: float | None = 0.2
    """Root mean square of a matrix's update, so that AdamW's learning rates carry over (Liu 2025, arXiv:2502.16982);
    None multiplies by sqrt(max(1, outputs / inputs)) instead, with learning rates near 0.02."""
    adam: str = ""
    """Regular expression of further paths to be left to Adam; empty for none."""
    adam_learning_rate: float = 1.0
    """Learning rate of the parameters under Adam, as a multiple."""
    b1: float = 0.9
    """Adam's decay rate of the first moment."""
    b2: float = 0.95
    """Adam's decay rate of the second moment."""
    eps: float = 1e-8
    """Added to denominators, Adam's and the norm before Newton-Schulz."""

    def settings(self, params: PyTree) -> dict[str, Setting]:
        """As for every optimizer; `adam` is checked too."""
        if self.adam:
            matching(self.adam, by_path(params), "optimizer.adam")
        return super().settings(params)

    def direction(self) -> optax.GradientTransformation:
        """Orthogonalised momentum for matrices, Adam's direction for the rest."""
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return optax.partition(
            {
                "matrix": optax.chain(self.orthogonalised(), optax.stateless(self.scale_by_shape)),
                "adam": optax.chain(adam, optax.scale(self.adam_learning_rate)),
            },
            lambda tree: map_paths(lambda path, _: "matrix" if self.orthogonalises(path) else "adam", tree),
        )

    def orthogonalised(self) -> optax.GradientTransformation:
        """The momentum of each layer's matrix with its singular values brought near 1 (0.7 to 1.2)."""
        return optax.contrib.scale_by_muon(
            ns_steps=self.steps,
            beta=self.momentum,
            eps=self.eps,
            nesterov=self.nesterov,
            preconditioning=self.preconditioning,
            weight_dimension_numbers=lambda tree: map_paths(
                lambda path, leaf: optax.contrib.MuonDimensionNumbers(*matrix_axes(path, leaf.ndim)), tree
            ),
        )

    def scale_by_shape(self, updates: PyTree, params: PyTree | None = None) -> PyTree:
        """Multiply each orthogonalised matrix by its factor, which depends on its sides alone."""
        del params

        def scale(path: str, update: Float[Array, "..."]) -> Float[Array, "..."]:
            inputs, outputs = (math.prod(update.shape[i] for i in axes) for axes in matrix_axes(path, update.ndim))
            if self.rms is None:
                return update * math.sqrt(max(1.0, outputs / inputs))
            return update * (self.rms * math.sqrt(max(inputs, outputs)))

        return map_paths(scale, updates)

    def orthogonalises(self, path: str) -> bool:
        """Whether the leaf at `path` holds matrices for Newton-Schulz; Adam takes the others."""
        return is_stacked(path) and is_matrix(path) and not (self.adam and re.search(self.adam, path))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "momentum", "b1", "b2")
        yield from eps_problems(self.eps)
        if self.steps < 1:
            yield "steps", "is below 1: use 5"
        if self.rms is not None and not self.rms > 0:
            yield "rms", "is not positive: use 0.2, or None to scale by shape"
        if why := regex_problem(self.adam):
            yield "adam", why
        if not self.adam_learning_rate > 0:
            yield "adam_learning_rate", "is not positive: it multiplies the learning rate, use for example 1.0"
