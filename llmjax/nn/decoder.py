"""Decoder-only language model: a repeated pattern of blocks between a token embedding and a readout head."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.block import Block, BlockModule
from llmjax.nn.distance import DistanceBias
from llmjax.nn.initializers import GPT2Init, Init
from llmjax.nn.linear import parameter
from llmjax.nn.mixer import Cache, Context, Distance
from llmjax.nn.model import Features, Model
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.positions import Positions
from llmjax.nn.sites import site


@dataclass(frozen=True)
class Decoder(Model):
    """logits = head(norm(blocks(embed(tokens)))). Radford et al. 2019; Touvron et al. 2023 (2302.13971)."""

    vocab: int = 256
    """token ids; at least the tokenizer's vocabulary"""
    d_model: int = 128
    """width of the residual stream"""
    layers: int = 4
    """number of blocks, a multiple of the pattern's length"""
    pattern: tuple[Block, ...] = (Block(),)
    """the blocks that are repeated; parameters are stacked over the repeats"""
    norm: Norm | None = RMSNorm()
    """normalisation before the head; None for post-norm stacks"""
    positions: Positions | None = None
    """absolute positions added to the embeddings; None where attention rotates, or for no positions"""
    distance: DistanceBias | None = None
    """a bias of the scores by distance, one table for the attention of all layers (T5, ALiBi)"""
    tied: bool = False
    """whether the head is the transposed embedding table"""
    soft_cap: float | None = None
    """logits become cap tanh(logit / cap) (Gemma 2, 2408.00118)"""
    dropout: float = 0.0
    """probability that a feature of an embedding is dropped in training"""
    initializer: Init = GPT2Init()
    """distribution of the initial weights"""
    remat: Literal["none", "full", "dots"] = "none"
    """what the backward pass recomputes: nothing, all but block inputs, or all but products with weights"""
    unroll: int = 8
    """repeats laid out in one step of the scan: short stacks run faster on CPU fully unrolled; 1 where remat is on"""

    def build(self) -> nn.Module:
        """The Linen module of this config."""
        return DecoderModule(self)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other, blocks and their mixers included."""
        for name in ("vocab", "d_model", "layers", "unroll"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
        if not self.pattern:
            yield "pattern", "must hold at least one Block"
        elif self.layers % len(self.pattern):
            yield "layers", f"must be a multiple of the pattern's length {len(self.pattern)}"
        if not 0 <= self.dropout < 1:
            yield "dropout", "must be at least 0 and below 1"
        for i, block in enumerate(self.pattern):
            yield from ((f"pattern.{i}.{field}", why) for field, why in block.problems_at(self.d_model))
            if block.sees_future():
                yield f"pattern.{i}", "sees later tokens, which a decoder is to predict: give it to an Encoder"
        if self.distance is not None:
            yield from distance_problems(self.pattern)
        for field, why in () if self.positions is None else self.positions.problems_at(self.d_model):
            yield f"positions.{field}", why

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> dict[str, Any]:
        """Empty decode state: `slot` (tokens stored), `positions` `[batch, length]`, `blocks` stacked over repeats."""
        repeats = self.layers // len(self.pattern)
        layer = {str(i): b.mixer.init_state(self.d_model, batch, length, dtype) for i, b in enumerate(self.pattern)}
        return {
            "slot": jnp.zeros((), jnp.int32),
            "positions": jnp.full((batch, length), -1, jnp.int32),
            "blocks": jax.tree.map(lambda a: jnp.broadcast_to(a, (repeats, *a.shape)), layer),
        }

    def flops_per_token(self, length: int) -> float:
        """6 per weight that multiplies a token (head included, lookup not), and 3 times the mixing's forward FLOPs.

        Causal attention counts the pairs that the mask lets through, about half of all (PaLM, 2204.02311, appendix B,
        counts all). Rematerialised work does not count.
        """
        repeats = self.layers // len(self.pattern)
        weights = repeats * sum(b.matmul_params(self.d_model) for b in self.pattern) + self.d_model * self.vocab
        mixing = repeats * sum(b.mixer.mixing_flops(self.d_model, length) for b in self.pattern)
        return 6 * weights + 3 * mixing

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """Bytes of decode state that one more token of context costs, over all layers, beyond a long context."""
        repeats, far = self.layers // len(self.pattern), 2**20
        near, twice = (sum(b.mixer.state_bytes(self.d_model, n, dtype) for b in self.pattern) for n in (far, 2 * far))
        return repeats * (twice - near) // far


class DecoderModule(nn.Module):
    """Owns `embed`, `positions`, `blocks`, `norm` and, where untied, `head`; sites embedded and final."""

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
        if c.distance is not None:
            heads = next(filter(None, (b.mixer.distance_heads() for b in c.pattern)))
            table = c.distance.build(heads, c.initializer, "distance")()
            context = replace(context, distance=Distance(table, c.distance))
        embedding = c.initializer.embedding()
        embed = Table("embedding", (c.vocab, c.d_model), ("vocab", "d_model"), embedding, name="embed")()
        x = jnp.take(embed, tokens, axis=0, mode="clip")
        if c.positions is not None:
            x = x + c.positions.build(c.d_model, c.initializer, name="positions")(context.positions).astype(x.dtype)
        x = site(self, "embedded", nn.Dropout(c.dropout, deterministic=deterministic)(x))
        layers = None if state is None else state["blocks"]
        x, layers = scanned(c)(c, name="blocks")(x, context, layers)
        if c.norm is not None:
            x = c.norm.build("norm")(x)
        x = site(self, "final", x)
        kernel = embed.T
        if not c.tied:
            head = c.initializer.kernel(c.d_model)
            kernel = Table("kernel", (c.d_model, c.vocab), ("d_model", "vocab"), head, name="head")()
        return Features(x, kernel, c.soft_cap), None if state is None else {**state, "blocks": layers}

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


class Table(nn.Module):
    """Owns one matrix called `label`, and returns it."""

    label: str
    shape: tuple[int, int]
    axes: tuple[str, str]
    initial: Callable[..., Float[Array, "rows columns"]]

    @nn.compact
    def __call__(self) -> Float[Array, "rows columns"]:
        """The matrix."""
        return parameter(self, self.label, self.initial, self.shape, self.axes)


class Repeat(nn.Module):
    """One repeat of the pattern, in the form that nn.scan carries."""

    config: Decoder

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: dict[str, Any] | None
    ) -> tuple[Float[Array, "batch length d_model"], dict[str, Any] | None]:
        """Run the pattern's blocks; `state` holds one entry a block."""
        c, new = self.config, {}
        for i, block in enumerate(c.pattern):
            name = str(i)
            layer = None if state is None else state[name]
            x, new[name] = BlockModule(block, c.d_model, c.layers, c.initializer, name=name)(x, context, layer)
        return x, None if state is None else new


def scanned(config: Decoder) -> Callable[..., nn.Module]:
    """`Repeat`, rematerialised by name and scanned over its stacked parameters, sites and states."""
    body, repeats = Repeat, config.layers // len(config.pattern)
    if config.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
        body = nn.remat(Repeat, policy=policy, prevent_cse=False)
    return nn.scan(
        body,
        variable_axes={True: 0},
        split_rngs={True: True},
        in_axes=(nn.broadcast, 0),
        length=repeats,
        # Laid out, XLA on CPU would merge what is recomputed with the forward pass again, and nothing would be saved.
        unroll=min(config.unroll, repeats) if config.remat == "none" else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def enter(
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"] | None,
    segment_ids: Int[Array, "batch length"] | None,
    state: dict[str, Any] | None,
) -> tuple[Context, dict[str, Any] | None]:
    """The layers' shared context, and the state with these tokens' positions stored."""
    if state is not None and segment_ids is not None:
        raise ValueError("segment_ids belong to packed training batches; decoding takes positions, -1 for padding")
    if positions is not None:
        segment_ids = jnp.where(positions < 0, -1, 0 if segment_ids is None else segment_ids)
    else:
        start = 0 if state is None else state["slot"]
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if state is None:
        return Context(positions, segment_ids), None
    slot = state["slot"]
    stored = jax.lax.dynamic_update_slice_in_dim(state["positions"], positions, slot, axis=1)
    context = Context(positions, segment_ids, Cache(slot, stored))
    return context, {**state, "slot": slot + positions.shape[1], "positions": stored}


def distance_problems(pattern: tuple[Block, ...]) -> Iterator[tuple[str, str]]:
    """Mixers that one table of distance biases does not fit."""
    heads = [block.mixer.distance_heads() for block in pattern]
    if not any(heads):
        yield "distance", "finds no scores to bias: it needs attention with rope=None and soft_cap=None in the pattern"
    for i, count in enumerate(heads):
        rotary = getattr(pattern[i].mixer, "rope", None) is not None
        if rotary or count not in (None, *list(filter(None, heads))[:1]):
            why = "rotates too" if rotary else f"has {count} heads, another mixer of the pattern has other ones"
            yield f"pattern.{i}.mixer", f"{why}: one table of distance biases serves all layers"


def readout(features: Features) -> Float[Array, "batch length vocab"]:
    """soft_cap(hidden @ kernel) in float32."""
    logits = jnp.einsum("bld,dv->blv", features.hidden, features.kernel, preferred_element_type=jnp.float32)
    if features.soft_cap is None:
        return logits
    return features.soft_cap * jnp.tanh(logits / features.soft_cap)
