"""Cross-attention: a decoder's queries over the keys and values of an encoder's states."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.nn.attention import Attention
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mixer import Context, Memory
from llmjax.nn.scores import Scores, Tokens
from llmjax.nn.sites import site


@dataclass(frozen=True)
class CrossAttention:
    """softmax(q k^T scale) v, q of the stream, k and v of `context.memory`. Vaswani et al. 2017 (1706.03762), 3.2.3.

    A token sees the memory of its own document, all of it.
    """

    heads: int = 4
    """query heads"""
    kv_heads: int | None = None
    """key and value heads, a divisor of heads; None is heads"""
    head_dim: int | None = None
    """features a head; None is d_model / heads"""
    scale: float | None = None
    """factor of the scores; None is 1 / sqrt(head_dim) (T5: 1)"""
    bias: bool = False
    """whether query, key and value projections have a bias (BART)"""
    out_bias: bool = False
    """whether the output projection has a bias (BART)"""
    implementation: str | None = None
    """kernel of `pallas_kernels.attention`: tpu, cudnn, hopper, xla or reference; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module, one of `layers` in its stack."""
        return CrossAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other."""
        return self.alike().problems()

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        return self.alike().problems_at(d_model)

    def alike(self) -> Attention:
        """Self-attention with the same heads."""
        return Attention(self.heads, self.kv_heads, self.head_dim, rope=None, implementation=self.implementation)

    def matmul_params(self, d_model: int) -> int:
        """Weights that multiply each token: two projections those of the stream, two those of the memory."""
        return self.alike().matmul_params(d_model)

    def mixing_flops(self, d_model: int, source: int) -> float:
        """Forward FLOPs per token of the mixing itself: 4 heads head_dim for each of `source` states."""
        heads, _, head_dim = self.alike().sizes(d_model)
        return 4 * heads * head_dim * source


class CrossAttentionModule(nn.Module):
    """Owns `query`, `key`, `value`, `out`; sites q, k, v and z (heads' output).

    Keys and values are projected from the memory at each call, in decoding too: no state holds them.
    """

    config: CrossAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context
    ) -> Float[Array, "batch length d_model"]:
        """Read `context.memory`; raises ValueError where there is none."""
        c, memory = self.config, context.memory
        if memory is None:
            raise ValueError("cross-attention reads the states of an encoder, and the context holds none")
        heads, kv_heads, head_dim = c.alike().sizes(self.d_model)
        q = self.project("query", "heads", heads, x)
        k, v = (self.project(name, "kv_heads", kv_heads, memory.states) for name in ("key", "value"))
        queries, keys = Tokens(context.positions, context.segment_ids), places(memory)
        scale = 1 / math.sqrt(head_dim) if c.scale is None else c.scale
        scores = Scores(q, k, v, queries, keys, scale=scale, causal=False, aligned=False)
        z = site(self, "z", replace(scores, implementation=c.implementation).run())
        residual = self.initializer.residual(heads * head_dim, self.layers)
        inputs, axes = (heads, head_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, c.out_bias, name="out")(z)

    def project(
        self, name: str, axis: str, heads: int, x: Float[Array, "batch tokens d_model"]
    ) -> Float[Array, "batch tokens heads head_dim"]:
        """One of the projections into heads, a site of its first letter."""
        c, axes = self.config, ("d_model", axis, "head_dim")
        outputs, kernel = (heads, c.alike().sizes(self.d_model)[2]), self.initializer.kernel(self.d_model)
        return site(self, name[0], Linear((self.d_model,), outputs, axes, kernel, c.bias, name=name)(x))


def places(memory: Memory) -> Tokens:
    """Where the memory's states stand: in their documents, all of them present that have a document."""
    return Tokens(jnp.zeros(memory.states.shape[:2], jnp.int32), memory.segment_ids)
