"""Multi-token prediction: a chain of blocks after the model, each of which predicts one token further ahead."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.nn.block import Block, BlockModule
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mixer import Context
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.sites import site


@dataclass(frozen=True)
class MultiToken:
    """h_k,i = block_k(W_k [norm(h_k-1,i); norm(embed(t_i+k))]), from which the model's head predicts t_i+k+1.

    h_0 are the model's final states; embedding and head are the model's own, so that the chain stays causal: h_k,i
    knows the tokens up to i + k. DeepSeek-V3 (2412.19437), section 2.2. It serves training (`llmjax.objectives.
    multi_token`): with a decode state nothing of it is computed.
    """

    depth: int = 1
    """further tokens that are predicted (DeepSeek-V3: 1)"""
    block: Block = Block()
    """the transformer block of each step"""
    norm: Norm = RMSNorm()
    """normalisation of both inputs, and before the head"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """A chain of nothing, blocks of another kind of stack."""
        if self.depth < 1:
            yield "depth", "must be at least 1, or multi_token=None"
        if self.block.order == "reversible":
            yield "block.order", "must be of one stream: pre, post or parallel"
        if self.block.sees_future():
            yield "block", "sees later tokens, which are to be predicted"
        if self.block.cross is not None:
            yield "block.cross", "reads the states of an encoder, which a decoder has none of"

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module, beside a stack of `layers`."""
        return MultiTokenModule(self, d_model, layers, init, name=name)

    def matmul_params(self, d_model: int, vocab: int) -> int:
        """Weights that multiply each token, the head of every step among them."""
        return self.depth * (2 * d_model * d_model + self.block.matmul_params(d_model) + d_model * vocab)


class MultiTokenModule(nn.Module):
    """Owns `hidden_norm_k`, `embed_norm_k`, `project_k`, `block_k` and `norm_k` for k = 1 to depth; site `ahead`."""

    config: MultiToken
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "batch length d_model"],
        embedded: Float[Array, "batch length d_model"],
        context: Context,
    ) -> Float[Array, "depth batch length d_model"]:
        """norm(h_k) for each k. Where the token at i + k is another document's or none, entry i means nothing."""
        c, d, ahead = self.config, self.d_model, []
        for k in range(1, c.depth + 1):
            further = jnp.roll(embedded, -k, axis=1)
            both = (c.norm.build(f"hidden_norm_{k}")(hidden), c.norm.build(f"embed_norm_{k}")(further))
            kernel = self.initializer.kernel(2 * d)
            project = Linear((2 * d,), (d,), (None, "d_model"), kernel, name=f"project_{k}")
            block = BlockModule(c.block, d, self.layers, self.initializer, name=f"block_{k}")
            hidden, _ = block(project(jnp.concatenate(both, axis=-1)), context)
            ahead.append(c.norm.build(f"norm_{k}")(hidden))
        return site(self, "ahead", jnp.stack(ahead))
