"""A residual block: a mixer, perhaps cross-attention, and a feed-forward layer, and how they are wired."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from llmjax.nn.attention import Attention
from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.initializers import Init
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.mlp import GLU, FeedForward
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.sites import site


@dataclass(frozen=True)
class Block:
    """pre: x + f(norm(x)); post: norm(x + f(x)); parallel: x + mixer(norm(x)) + mlp(norm(x)), one norm.

    parallel_norms: parallel with a norm for each; branch: x + norm(f(x)); sandwich: x + norm'(f(norm(x))).
    reversible: two streams, y1 = x1 + mixer(norm(x2)), y2 = x2 + mlp(norm(y1)) (`llmjax.nn.reversible`).
    """

    mixer: Mixer = Attention()
    """how tokens exchange information"""
    mlp: FeedForward | None = GLU()
    """what is computed at each token; None for attention-only models"""
    norm: Norm | None = RMSNorm()
    """normalisation of each branch; None for branches that read the stream as it is"""
    order: Literal["pre", "post", "parallel", "parallel_norms", "branch", "sandwich", "reversible"] = "pre"
    """wiring (pre: Radford et al. 2019; post: Vaswani et al. 2017; parallel: GPT-J; parallel_norms: GPT-NeoX,
    2204.06745; branch: OLMo 2, 2501.00656; sandwich: Gemma 2, 2408.00118; reversible: Kitaev et al. 2020)"""
    dropout: float = 0.0
    """probability that a feature of a branch's output is dropped in training"""
    cross: CrossAttention | None = None
    """what reads an encoder's states, between mixer and mlp (Vaswani et al. 2017); None in models of one stack"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range, and parts that a wiring has no place for."""
        if not 0 <= self.dropout < 1:
            yield "dropout", "must be at least 0 and below 1"
        if self.norm is None and self.order not in ("pre", "parallel"):
            yield "norm", f"leaves nothing of order={self.order}: use pre or parallel"
        if self.order == "reversible" and self.mlp is None:
            yield "mlp", "is the second stream's branch: order=reversible needs one"
        if self.order in ("parallel", "parallel_norms", "reversible") and self.cross is not None:
            yield "cross", f"has no place in order={self.order}: use pre or post"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Fields of the mixers that do not fit a model of this width."""
        yield from ((f"mixer.{field}", why) for field, why in self.mixer.problems_at(d_model))
        if self.cross is not None:
            yield from ((f"cross.{field}", why) for field, why in self.cross.problems_at(d_model))

    def sees_future(self) -> bool:
        """Whether a token's output depends on later tokens."""
        return self.mixer.sees_future() or (self.mlp is not None and self.mlp.sees_future())

    def any_order(self) -> bool:
        """Whether tokens may stand in any order: dropout would draw other bits for each."""
        return (
            self.mixer.any_order() and (self.mlp is None or self.mlp.any_order()) and not (self.dropout or self.cross)
        )

    def matmul_params(self, d_model: int) -> int:
        """Weights that multiply each token, those of cross-attention among them."""
        parts = (self.mixer, self.cross, self.mlp)
        return sum(part.matmul_params(d_model) for part in parts if part is not None)


class BlockModule(nn.Module):
    """Owns `mixer`, `cross`, `mlp` and their norms.

    Sites resid_pre, mixer_out, resid_mid, cross_out, resid_cross (these two with cross-attention), mlp_out, resid_post.
    """

    config: Block
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Run the block on residual stream `x` `[batch, length, d_model]`."""
        c, sizes = self.config, (self.d_model, self.layers, self.initializer)
        x = site(self, "resid_pre", x)
        start, normed = x, self.before("mixer_norm", x)
        y, state = c.mixer.build(*sizes, name="mixer")(normed, context, state)
        y = site(self, "mixer_out", self.drop(self.branch("mixer", y), context))
        x = site(self, "resid_mid", self.after("mixer_norm", x + y))
        if c.cross is not None:
            y = c.cross.build(*sizes, name="cross")(self.before("cross_norm", x), context)
            y = site(self, "cross_out", self.drop(self.branch("cross", y), context))
            x = site(self, "resid_cross", self.after("cross_norm", x + y))
        if c.mlp is not None:
            if c.order != "parallel":
                normed = self.before("mlp_norm", start if c.order == "parallel_norms" else x)
            y = self.branch("mlp", c.mlp.build(*sizes, name="mlp")(normed, context))
            x = self.after("mlp_norm", x + site(self, "mlp_out", self.drop(y, context)))
        return site(self, "resid_post", x), state

    def before(self, name: str, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_model"]:
        """What a branch reads: the stream's norm, or where norms come later the stream."""
        return x if self.config.order in ("post", "branch") else self.normed(name, x)

    def branch(self, name: str, y: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_model"]:
        """What a branch adds: its output, or that output's norm."""
        if self.config.order not in ("branch", "sandwich"):
            return y
        return self.normed(f"{name}_norm" if self.config.order == "branch" else f"{name}_out_norm", y)

    def after(self, name: str, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_model"]:
        """The stream after a branch: normalised in post-norm blocks."""
        return self.normed(name, x) if self.config.order == "post" else x

    def normed(self, name: str, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_model"]:
        """`x` after the norm `name`, where the block has norms."""
        return x if self.config.norm is None else self.config.norm.build(name)(x)

    def drop(self, y: Float[Array, "batch length d_model"], context: Context) -> Float[Array, "batch length d_model"]:
        """Dropout of a branch's output; the identity in deterministic mode."""
        return nn.Dropout(self.config.dropout, deterministic=context.deterministic)(y)
