"""Decoder-only language model: a stack of causal blocks between a token embedding and a readout head."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.linear import parameter
from llmjax.nn.model import Features, Model, readout
from llmjax.nn.multi_token import MultiToken
from llmjax.nn.softmax_mixture import SoftmaxMixture
from llmjax.nn.stack import Stack, StackModule, cross_problems, embedding, enter, look_up, untied


@dataclass(frozen=True)
class Decoder(Stack, Model):
    """logits = head(norm(blocks(embed(tokens)))). Radford et al. 2019; Touvron et al. 2023 (2302.13971)."""

    vocab: int = 256
    """token ids; at least the tokenizer's vocabulary"""
    tied: bool = False
    """whether the head is the transposed embedding table"""
    head_bias: bool = False
    """whether an untied head adds a bias (GPT-J, Phi-2)"""
    embedding_scale: float = 1.0
    """factor of the token embeddings, not of a tied head (Gemma, 2403.08295: sqrt(d_model))"""
    soft_cap: float | None = None
    """logits become cap tanh(logit / cap) (Gemma 2, 2408.00118)"""
    mixture: SoftmaxMixture | None = None
    """a head of several softmaxes over the same table; None for one softmax"""
    multi_token: MultiToken | None = None
    """what predicts the tokens after the next one, for the objective MultiToken"""

    def build(self) -> nn.Module:
        """The Linen module of this config."""
        return DecoderModule(self)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other, blocks and their mixers included."""
        if self.vocab < 1:
            yield "vocab", "must be at least 1"
        if self.head_bias and (self.tied or self.mixture is not None or self.multi_token is not None):
            yield "head_bias", "belongs to one head of its own: set tied=False, mixture=None and multi_token=None"
        yield from super().problems()
        yield from causal_problems(self)
        yield from cross_problems(self.pattern)
        if self.multi_token is not None and self.layers < 1:
            yield "multi_token", "goes on from a stack of at least one layer: raise model.layers"
        if self.multi_token is not None:
            found = self.multi_token.block.problems_at(self.d_model)
            yield from ((f"multi_token.block.{field}", why) for field, why in found)

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> dict[str, Any]:
        """Empty decode state: `slot` (tokens stored), `positions` `[batch, length]`, `blocks` stacked over repeats."""
        return self.empty_state(batch, length, dtype)

    def flops_per_token(self, length: int) -> float:
        """6 per weight that multiplies a token (head included, lookup not), and 3 times the mixing's forward FLOPs.

        Causal attention counts the pairs that the mask lets through, about half of all (PaLM, 2204.02311, appendix B,
        counts all). Rematerialised work does not count.
        """
        weights, mixing = self.matmul_params() + self.d_model * self.vocab, self.mixing_flops(length)
        if self.mixture is not None:
            weights += self.mixture.matmul_params(self.d_model, self.vocab) - self.d_model * self.vocab
        if self.multi_token is not None:
            weights += self.multi_token.matmul_params(self.d_model, self.vocab)
            mixing += self.multi_token.depth * self.multi_token.block.mixer.mixing_flops(self.d_model, length)
        return 6 * weights + 3 * mixing

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """Bytes of decode state that one more token of context costs, over all layers, beyond a long context."""
        return self.cache_bytes_per_token(dtype)


class DecoderModule(StackModule):
    """Owns `embed`, the stack's parts and, where they exist, `head`, `mixture` and `multi_token`."""

    config: Decoder

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        state: dict[str, Any] | None = None,
        deterministic: bool = True,
        prefix: Bool[Array, "batch length"] | None = None,
    ) -> tuple[Features, dict[str, Any] | None]:
        """Hidden states before the head, the head, and the decode state after these tokens (None without one)."""
        c = self.config
        context, state = enter(tokens, positions, segment_ids, state)
        context = replace(context, prefix=prefix, deterministic=deterministic)
        table = embedding(c.vocab, c.d_model, c.initializer, "embed")()
        embedded = look_up(table, tokens) * c.embedding_scale
        x, layers = self.hidden(embedded, context, None if state is None else state["blocks"])
        kernel = table.T if c.tied else untied(c.vocab, c.d_model, c.initializer, "head")()
        if c.head_bias:  # one more feature that is always 1: every objective takes the bias for a row of the kernel
            bias = parameter(self, "head_bias", jax.nn.initializers.zeros, (c.vocab,), ("vocab",))
            kernel = jnp.concatenate([kernel, bias[None].astype(kernel.dtype)])
            x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
        features = Features(x, kernel, c.soft_cap)
        if c.mixture is not None:
            features = replace(features, mixture=c.mixture.build(c.d_model, c.initializer, "mixture")())
        if c.multi_token is not None and state is None:
            chain = c.multi_token.build(c.d_model, c.layers, c.initializer, "multi_token")
            features = replace(features, ahead=chain(x, embedded, context))
        return features, None if state is None else {**state, "blocks": layers}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        state: dict[str, Any] | None = None,
        deterministic: bool = True,
        prefix: Bool[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length vocab"], dict[str, Any] | None]:
        """Float32 logits of the next token at every position, and the decode state; `prefix` is seen by all."""
        features, state = self.features(tokens, positions, segment_ids, state, deterministic, prefix)
        return readout(features), state


def causal_problems(stack: Stack) -> Iterator[tuple[str, str]]:
    """Blocks that a decoder cannot have."""
    for i, block in enumerate(stack.pattern):
        if block.sees_future():
            yield f"pattern.{i}", "sees later tokens, which a decoder is to predict: give it to an Encoder"
