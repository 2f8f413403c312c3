"""Longformer attention with projections of its own for the global tokens' queries and for the keys they look at."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, Float

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mask_longformer import Longformer
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scores import Scores, scores_of
from llmjax.nn.sites import site


@dataclass(frozen=True)
class LongformerAttention(Mixer):
    """softmax(q k^T) v under `mask` for most tokens; softmax(q' k'^T) v' over all tokens for the global ones.

    Beltagy et al. 2020 (2004.05150), section 3.1. For encoders; `Attention(mask=Longformer())` shares one set.
    """

    heads: int = 4
    """query, key and value heads of d_model / heads features"""
    mask: Longformer = Longformer()
    """the window, and which tokens are global"""
    bias: bool = True
    """whether the projections have a bias (paper: as RoBERTa)"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return LongformerAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """No heads, or no global tokens."""
        if self.heads < 1:
            yield "heads", "must be at least 1"
        if self.mask.globals == 0:
            yield "mask.globals", "is 0: the global projections would be read by nobody"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the width."""
        if self.heads > 0 and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}"

    def sees_future(self) -> bool:
        """Always: global tokens see the whole document."""
        return True

    def matmul_params(self, d_model: int) -> int:
        """Two sets of query, key and value projections, and one of the output."""
        return 7 * d_model**2

    def mixing_flops(self, d_model: int, length: int) -> float:
        """4 d_model for every key that a query sees."""
        return 4 * d_model * self.mask.keys_seen(length, causal=False)


class LongformerAttentionModule(nn.Module):
    """Owns `query`, `key`, `value`, the same with `global_` before, and `out`; sites q, k, v, z."""

    config: LongformerAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length, both ways."""
        c = self.config
        mask = c.mask
        local = self.scores(x, x, context, "")
        # Only the first tokens of a row of one document are global.
        first = x[:, : mask.globals] if context.segment_ids is None else x
        z = mask.joined(mask.local(local), self.scores(first, x, context, "global_"))
        z = site(self, "z", z)
        residual, inputs = self.initializer.residual(self.d_model, self.layers), (c.heads, self.d_model // c.heads)
        axes = ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, c.bias, name="out")(z), state

    def scores(
        self,
        queries: Float[Array, "batch rows d_model"],
        keys: Float[Array, "batch length d_model"],
        context: Context,
        prefix: str,
    ) -> Scores:
        """Scores by the projections whose names begin with `prefix`."""
        c = self.config
        head_dim = self.d_model // c.heads
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "heads", "head_dim")
        arguments = ((self.d_model,), (c.heads, head_dim), axes, kernel, c.bias)
        q, k, v = (
            site(self, prefix + name[0], Linear(*arguments, name=prefix + name)(x))
            for name, x in (("query", queries), ("key", keys), ("value", keys))
        )
        return scores_of(q, k, v, context, scale=1 / math.sqrt(head_dim), causal=False)
