"""Positions as a bias of attention scores that depends on the distance of query and key."""

from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, Float, Int

from llmjax.nn.initializers import Init

Folded = tuple[
    Float[Array, "batch length heads features"],
    Float[Array, "batch source kv_heads features"],
    Float[Array, "batch heads length source"] | None,
]


@dataclass(frozen=True)
class DistanceBias:
    """Base of the distance biases: softmax(q k^T scale + bias(i - j)) v, one table for all layers of a model."""

    def build(self, heads: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module; its call takes nothing and gives the table `[heads, entries]`."""
        raise NotImplementedError

    def scores(
        self,
        table: Float[Array, "heads entries"],
        query_positions: Int[Array, "batch length"],
        key_positions: Int[Array, "batch source"],
        causal: bool,
    ) -> Float[Array, "batch heads length source"]:
        """What is added to the scores (after their scale), float32; pairs that a mask hides may have any value."""
        raise NotImplementedError

    def fold(
        self,
        table: Float[Array, "heads entries"],
        query: Float[Array, "batch length heads head_dim"],
        key: Float[Array, "batch source kv_heads head_dim"],
        query_positions: Int[Array, "batch length"],
        key_positions: Int[Array, "batch source"],
        scale: float,
        causal: bool,
    ) -> Folded:
        """Queries, keys and bias with the same scores, q' k'^T scale + bias', for attention to work with.

        A bias that queries and keys can carry by themselves gives None for it, so that kernels without a bias do.
        Not for scores with a soft cap where the bias comes after it.
        """
        return query, key, self.scores(table, query_positions, key_positions, causal)
