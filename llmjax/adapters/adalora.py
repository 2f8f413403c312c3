"""AdaLoRA: a low-rank change in the form of a singular value decomposition, whose values can be cut. 2303.10512."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Boxes, Call, boxed
from llmjax.adapters.diagonal import Diagonal
from llmjax.nn.auxiliary import LOSSES, hand_out
from llmjax.nn.projections import Projection, projection_of


@dataclass(frozen=True)
class AdaLoRA(Diagonal):
    """W' = W + s P diag(v) Q; v starts at zero, P and Q at normal numbers, and are drawn to be orthonormal by a loss.

    Zhang et al. 2023. Which values are kept is for the optimizer to say (`llmjax.train.optimizers.RankBudgetAdamW`):
    those that are cut are zero, and may come back. P and Q are `a` and `b`.
    """

    orthogonality: float = 0.5
    """weight of |P^T P - I|^2 + |Q Q^T - I|^2, summed over matrices, in the loss"""

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """P and Q normal with deviation 0.02 (as peft draws them), values zero."""
        keys = jax.random.split(key)
        a = 0.02 * jax.random.normal(keys[0], (*projection.inputs, self.rank))
        b = 0.02 * jax.random.normal(keys[1], (self.rank, *projection.outputs))
        return {
            "a": boxed(a, *projection.input_axes, "rank"),
            "b": boxed(b, "rank", *projection.output_axes),
            "singular": boxed(jnp.zeros(self.rank), "rank"),
        }

    def factors(self, params: Any) -> Float[Array, " rank"]:
        """The values."""
        return params["singular"]

    def around(self, call: Call) -> Any:
        """The changed product; the loss is handed out beside it."""
        projection = projection_of(call.module)
        assert projection is not None
        loss = penalty if projection.experts is None else jax.vmap(penalty)
        value = self.orthogonality * jnp.sum(loss(call.params["a"], call.params["b"]))
        hand_out(call.module, LOSSES, f"{self.name}_orthogonality", value)
        return super().around(call)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.orthogonality < 0:
            yield "orthogonality", "must not be negative: it draws P and Q towards orthonormal ones"


def penalty(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, ""]:
    """|P^T P - I|^2 + |Q Q^T - I|^2, float32; the axes of inputs, and of outputs, count as one."""
    p, q = (x.astype(jnp.float32) for x in (a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)))
    one = jnp.eye(b.shape[0])
    return jnp.sum(jnp.square(p.T @ p - one)) + jnp.sum(jnp.square(q @ q.T - one))
