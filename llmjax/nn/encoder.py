"""Encoder-only model: every token sees its whole document; a pooled state and a head for masked tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.config import InputError
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mlp import Activation, activation
from llmjax.nn.model import Features, Model, readout
from llmjax.nn.norms import LayerNorm, Norm
from llmjax.nn.sites import site
from llmjax.nn.stack import Stack, StackModule, Table, cross_problems, embedding, enter, look_up, untied


@dataclass(frozen=True)
class MaskedHead:
    """logits = norm(f(x W + b)) E^T + c, E the embeddings or a table of its own. Devlin et al. 2018 (their code)."""

    activation: Activation = "gelu"
    """element-wise function f (BERT)"""
    norm: Norm = LayerNorm(eps=1e-12)
    """normalisation of the transformed states (BERT)"""
    tied: bool = True
    """whether E is the embedding table"""

    def build(self, vocab: int, d_model: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return MaskedHeadModule(self, vocab, d_model, init, name=name)


@dataclass(frozen=True)
class Encoder(Stack, Model):
    """states = norm(blocks(embed(tokens) + types + positions)). Devlin et al. 2018 (1810.04805).

    BERT is norm=None, embedding_norm=LayerNorm(1e-12), LearnedPositions(512), token_types=2, a pooler, and blocks of
    order="post" with Attention(causal=False, rope=None).
    """

    pattern: tuple[Block, ...] = (Block(mixer=Attention(causal=False)),)
    """the blocks that are repeated, causal or not; parameters are stacked over the repeats"""
    vocab: int = 256
    """token ids; at least the tokenizer's vocabulary and the mask's id"""
    token_types: int = 0
    """kinds of token that have an embedding of their own (BERT: 2, first and second sentence); 0 for none"""
    pooler: bool = False
    """whether tanh(W x + b) of each row's first token is computed, a summary of the row"""
    row_classes: int = 0
    """what rows are told apart by, from the pooled state (BERT: 2, whether its second part follows the first in the
    text or was drawn from elsewhere); 0 for none"""
    head: MaskedHead | None = MaskedHead()
    """what predicts masked tokens; None scores with the embedding table alone"""

    def build(self) -> nn.Module:
        """The Linen module of this config."""
        return EncoderModule(self)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other, blocks and their mixers included."""
        if self.vocab < 1:
            yield "vocab", "must be at least 1"
        if self.token_types < 0:
            yield "token_types", "must not be negative"
        if self.row_classes < 0:
            yield "row_classes", "must not be negative"
        if self.row_classes and not self.pooler:
            yield "row_classes", "are told apart by the pooled state: set pooler=True"
        yield from super().problems()
        yield from cross_problems(self.pattern)

    def generates(self) -> bool:
        """It fills gaps."""
        return False

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> Any:
        """Raises InputError: what a token becomes depends on all later ones, so nothing can be kept."""
        raise InputError("an Encoder keeps no decode state: it fills gaps and does not continue a text")

    def flops_per_token(self, length: int) -> float:
        """6 per weight that multiplies a token (head included, lookup not), and 3 times the mixing's forward FLOPs."""
        head = self.d_model * self.vocab + (self.d_model**2 if self.head is not None else 0)
        return 6 * (self.matmul_params() + head) + 3 * self.mixing_flops(length)

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """None: there is no decode state."""
        return 0


@flax.struct.dataclass
class Encoded:
    """States of all tokens, the pooled state of each row (None without a pooler), and what the head reads.

    `row_logits` are float32 logits of each row's class, None where there are no such classes.
    """

    states: Float[Array, "batch length d_model"]
    pooled: Float[Array, "batch d_model"] | None
    features: Features
    row_logits: Float[Array, "batch classes"] | None = None


class EncoderModule(StackModule):
    """Owns `embed`, the stack's parts and, where they exist, `types`, `pooler`, `row_head`, `head`; site pooled."""

    config: Encoder

    @nn.compact
    def encode(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
        token_types: Int[Array, "batch length"] | None = None,
    ) -> Encoded:
        """All that is known of the tokens; positions -1 are padding, `token_types` None is type 0."""
        c, sizes = self.config, (self.config.d_model, self.config.initializer)
        context, _ = enter(tokens, positions, segment_ids, None)
        context = replace(context, deterministic=deterministic)
        table = embedding(c.vocab, *sizes, name="embed")()
        x = look_up(table, tokens)
        if c.token_types:
            shape, initial = (c.token_types, c.d_model), c.initializer.embedding()
            types = Table("embedding", shape, ("entries", "d_model"), initial, name="types")()
            x = x + look_up(types, jnp.zeros_like(tokens) if token_types is None else token_types)
        x, _ = self.hidden(x, context, None)
        pooled = rows = None
        if c.pooler:
            first = jnp.argmax(context.positions >= 0, axis=1)
            row = jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0]
            kernel, axes = c.initializer.kernel(c.d_model), ("d_model", None)
            pooled = jnp.tanh(Linear((c.d_model,), (c.d_model,), axes, kernel, bias=True, name="pooler")(row))
            pooled = site(self, "pooled", pooled)
            if c.row_classes:
                head = Linear((c.d_model,), (c.row_classes,), axes, kernel, bias=True, name="row_head")
                rows = head(pooled).astype(jnp.float32)
        features = Features(x, table.T) if c.head is None else c.head.build(c.vocab, *sizes, name="head")(x, table)
        return Encoded(x, pooled, features, rows)

    def features(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
        token_types: Int[Array, "batch length"] | None = None,
    ) -> tuple[Features, None]:
        """What the head reads, and the head; there is no decode state."""
        return self.encode(tokens, positions, segment_ids, deterministic, token_types).features, None

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
        token_types: Int[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length vocab"], None]:
        """Float32 logits of the token at every position itself; there is no decode state."""
        return readout(self.features(tokens, positions, segment_ids, deterministic, token_types)[0]), None


class MaskedHeadModule(nn.Module):
    """Owns `dense`, `norm`, `bias` and, where untied, `table`."""

    config: MaskedHead
    vocab: int
    d_model: int
    initializer: Init

    @nn.compact
    def __call__(self, x: Float[Array, "batch length d_model"], table: Float[Array, "vocab d_model"]) -> Features:
        """The transformed states with a feature that is 1, and E^T with a row c for it: losses need know of no bias."""
        c, d = self.config, self.d_model
        dense = Linear((d,), (d,), ("d_model", None), self.initializer.kernel(d), bias=True, name="dense")
        x = c.norm.build("norm")(activation(c.activation)(dense(x)))
        kernel = table.T if c.tied else untied(self.vocab, d, self.initializer, "table")()
        bias = parameter(self, "bias", jax.nn.initializers.zeros, (self.vocab,), ("vocab",))
        one = jnp.ones((*x.shape[:2], 1), x.dtype)
        return Features(jnp.concatenate([x, one], axis=-1), jnp.concatenate([kernel, bias[None]]))
