"""A residual block: a mixer and a feed-forward layer, wired pre-norm, post-norm or in parallel."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from llmjax.nn.attention import Attention
from llmjax.nn.initializers import Init
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.mlp import GLU, FeedForward
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.sites import site


@dataclass(frozen=True)
class Block:
    """pre: x + f(norm(x)); post: norm(x + f(x)); parallel: x + mixer(norm(x)) + mlp(norm(x)), one norm."""

    mixer: Mixer = Attention()
    """how tokens exchange information"""
    mlp: FeedForward | None = GLU()
    """what is computed at each token; None for attention-only models"""
    norm: Norm = RMSNorm()
    """normalisation of each branch"""
    order: Literal["pre", "post", "parallel"] = "pre"
    """wiring (pre: Radford et al. 2019; post: Vaswani et al. 2017; parallel: GPT-J)"""
    dropout: float = 0.0
    """probability that a feature of a branch's output is dropped in training"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if not 0 <= self.dropout < 1:
            yield "dropout", "must be at least 0 and below 1"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Fields of the mixer that do not fit a model of this width."""
        return ((f"mixer.{field}", why) for field, why in self.mixer.problems_at(d_model))

    def sees_future(self) -> bool:
        """Whether a token's output depends on later tokens."""
        return self.mixer.sees_future() or (self.mlp is not None and self.mlp.sees_future())

    def matmul_params(self, d_model: int) -> int:
        """Weights that multiply each token."""
        return self.mixer.matmul_params(d_model) + (self.mlp.matmul_params(d_model) if self.mlp else 0)


class BlockModule(nn.Module):
    """Owns `mixer`, `mlp` and their norms; sites resid_pre, mixer_out, resid_mid, mlp_out, resid_post."""

    config: Block
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Run the block on residual stream `x` `[batch, length, d_model]`."""
        c = self.config
        mixer = c.mixer.build(self.d_model, self.layers, self.initializer, name="mixer")
        x = site(self, "resid_pre", x)
        normed = x if c.order == "post" else c.norm.build("mixer_norm")(x)
        y, state = mixer(normed, context, state)
        y = site(self, "mixer_out", self.drop(y, context))
        middle = x + y
        if c.order == "post":
            middle = c.norm.build("mixer_norm")(middle)
        middle = site(self, "resid_mid", middle)
        if c.mlp is None:
            return site(self, "resid_post", middle), state
        mlp = c.mlp.build(self.d_model, self.layers, self.initializer, name="mlp")
        if c.order == "pre":
            normed = c.norm.build("mlp_norm")(middle)
        elif c.order == "post":
            normed = middle
        out = middle + site(self, "mlp_out", self.drop(mlp(normed, context), context))
        if c.order == "post":
            out = c.norm.build("mlp_norm")(out)
        return site(self, "resid_post", out), state

    def drop(self, y: Float[Array, "batch length d_model"], context: Context) -> Float[Array, "batch length d_model"]:
        """Dropout of a branch's output; the identity in deterministic mode."""
        return nn.Dropout(self.config.dropout, deterministic=context.deterministic)(y)
