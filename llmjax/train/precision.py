"""Mixed precision: which dtype holds the parameters, which one computes, and what the objective receives.

Micikevicius 2017 (arXiv:1710.03740). The policy of the house: parameters, gradients and optimizer state are float32
(the masters); the forward and backward pass run in `compute`; norms, softmax, losses and metrics are float32 inside
their modules. Differentiating with respect to the masters through `cast_compute` returns float32 gradients, because
the transpose of a cast is the cast back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from llmjax.nn.model import cast
from llmjax.train.loss_scale import LossScale


@dataclass(frozen=True)
class Precision:
    """Dtype policy of a run; the parameters themselves are always float32."""

    compute: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the forward and backward pass: activations and the copies of the parameters that they meet."""
    loss_scale: LossScale | None = None
    """Loss scaling; needed with float16, whose small gradients vanish otherwise."""

    def cast_compute(self, tree: PyTree) -> PyTree:
        """The tree with its floating-point leaves in the compute dtype; integers, booleans and keys stay."""
        return cast(tree, jnp.dtype(self.compute))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if self.compute == "float16" and self.loss_scale is None:
            yield "loss_scale", "leaves float16 gradients to vanish below 6e-8: use Dynamic(), or compute='bfloat16'"


def dtypes(tree: PyTree) -> dict[str, str]:
    """Audit: parameter path -> dtype name for each leaf (arrays or shape structs), in path order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): str(leaf.dtype) for path, leaf in leaves}
