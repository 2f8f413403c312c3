"""Encoder-decoder model: a stack that sees the whole source, and a causal one that writes the target and reads it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.decoder import causal_problems
from llmjax.nn.mixer import Context, Memory
from llmjax.nn.model import Features, Model, readout
from llmjax.nn.stack import Stack, StackModule, cross_problems, embedding, enter, look_up, untied


@dataclass(frozen=True)
class Tower(Stack):
    """One of the two stacks."""


@dataclass(frozen=True)
class EncoderDecoder(Model):
    """logits = head(decoder(embed(target), memory)), memory = encoder(embed(source)). Vaswani et al. 2017 (1706.03762).

    T5 (Raffel et al. 2019, 1910.10683) has RMSNorm, T5Bias in each tower, attention and cross-attention with rope=None
    and scale=1, and, in its first version, scaled=True; version 1.1 has tied=False, scaled=False and a gelu GLU.
    """

    vocab: int = 256
    """token ids of source and target"""
    encoder: Tower = Tower(pattern=(Block(mixer=Attention(causal=False)),))
    """the stack that reads the source, causal or not"""
    decoder: Tower = Tower(pattern=(Block(cross=CrossAttention()),))
    """the causal stack that writes the target; one of its blocks at least has cross-attention"""
    shared: bool = True
    """whether source and target have one embedding table"""
    tied: bool = True
    """whether the head is the target's transposed embedding table"""
    scaled: bool = False
    """whether states are divided by sqrt(d_model) before the head (T5 with a tied head)"""

    def build(self) -> nn.Module:
        """The Linen module of this config."""
        return EncoderDecoderModule(self)

    def example(self) -> dict[str, Any]:
        """The smallest input that initialises every parameter."""
        return super().example() | {"source": jnp.zeros((1, 1), jnp.int32)}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Towers that do not fit each other; cross-attention where there is nothing to read, or none at all."""
        if self.vocab < 1:
            yield "vocab", "must be at least 1"
        if self.encoder.d_model != self.decoder.d_model:
            yield "decoder.d_model", f"must be that of the encoder, {self.encoder.d_model}"
        checks = {"encoder": [cross_problems(self.encoder.pattern)]}
        checks["decoder"] = [causal_problems(self.decoder), cross_problems(self.decoder.pattern, wanted=True)]
        for tower, found in checks.items():
            yield from ((f"{tower}.{field}", why) for problems in found for field, why in problems)

    def generates(self) -> bool:
        """It answers a source."""
        return False

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> dict[str, Any]:
        """Empty decode state of the target; the memory is an argument of each call."""
        return self.decoder.empty_state(batch, length, dtype)

    def flops_per_token(self, length: int) -> float:
        """6 per weight and 3 times the forward FLOPs of the mixing, for a token of a source and one of a target.

        Both have `length` tokens.
        """
        weights = self.encoder.matmul_params() + self.decoder.matmul_params() + self.decoder.d_model * self.vocab
        return 6 * weights + 3 * (self.encoder.mixing_flops(length) + self.decoder.mixing_flops(length))

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """Bytes of decode state that one more token of the target costs."""
        return self.decoder.cache_bytes_per_token(dtype)


class TowerModule(StackModule):
    """Owns the stack's parts."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "batch length d_model"], dict[str, Any] | None]:
        """States of embedded tokens, and the layers' decode state."""
        return self.hidden(x, context, state)


class EncoderDecoderModule(nn.Module):
    """Owns `embed`, `encoder`, `decoder` and, where they are apart, `source_embed` and `head`."""

    config: EncoderDecoder

    def setup(self) -> None:
        """The parts."""
        c, sizes = self.config, (self.config.vocab, self.config.decoder.d_model, self.config.decoder.initializer)
        self.encoder, self.decoder = TowerModule(c.encoder), TowerModule(c.decoder)
        self.embed = embedding(*sizes)
        if not c.shared:
            self.source_embed = embedding(*sizes)
        if not c.tied:
            self.head = untied(*sizes)

    def encode(
        self,
        source: Int[Array, "batch source"],
        source_positions: Int[Array, "batch source"] | None = None,
        source_segment_ids: Int[Array, "batch source"] | None = None,
        deterministic: bool = True,
    ) -> Memory:
        """The source's states, and where they are; positions -1 are padding."""
        context, _ = enter(source, source_positions, source_segment_ids, None)
        table = self.embed() if self.config.shared else self.source_embed()
        states, _ = self.encoder(look_up(table, source), replace(context, deterministic=deterministic))
        return Memory(states, context.segment_ids)

    def features(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        state: dict[str, Any] | None = None,
        deterministic: bool = True,
        source: Int[Array, "batch source"] | None = None,
        source_positions: Int[Array, "batch source"] | None = None,
        source_segment_ids: Int[Array, "batch source"] | None = None,
        memory: Memory | None = None,
    ) -> tuple[Features, dict[str, Any] | None]:
        """States of the target `tokens`, the head, and the decode state after them (None without one).

        The source is given as tokens, or encoded once as the `memory` that `encode` returns. Packed rows of both sides
        meet by their segment ids. Raises ValueError where neither or both are given.
        """
        c = self.config
        if (source is None) == (memory is None):
            raise ValueError("give an encoder-decoder a source, or the memory that encode() made of it")
        if source is not None:
            memory = self.encode(source, source_positions, source_segment_ids, deterministic)
        context, state = enter(tokens, positions, segment_ids, state)
        context = replace(context, memory=memory, deterministic=deterministic)
        table = self.embed()
        x, layers = self.decoder(look_up(table, tokens), context, None if state is None else state["blocks"])
        x = x / c.decoder.d_model**0.5 if c.scaled else x
        features = Features(x, table.T if c.tied else self.head())
        return features, None if state is None else {**state, "blocks": layers}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        state: dict[str, Any] | None = None,
        deterministic: bool = True,
        **source: Any,
    ) -> tuple[Float[Array, "batch length vocab"], dict[str, Any] | None]:
        """Float32 logits of the next target token at every position, and the decode state; `source` as in features."""
        features, state = self.features(tokens, positions, segment_ids, state, deterministic, **source)
        return readout(features), state
