"""Gated cross-attention: layers that let a finished language model look at images, and change nothing at first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.decoder import Decoder, DecoderModule
from llmjax.nn.initializers import Init
from llmjax.nn.linear import parameter
from llmjax.nn.mixer import Context, Memory
from llmjax.nn.mlp import MLP, FeedForward
from llmjax.nn.model import Features, Model, readout
from llmjax.nn.norms import LayerNorm, Norm
from llmjax.nn.sites import site
from llmjax.nn.stack import Repeat, remembering
from llmjax.nn.visual_tokens import Projector, ProjectorModule
from llmjax.nn.vit import ViT, ViTModule


@dataclass(frozen=True)
class GatedCrossAttention:
    """y = x + tanh(a) attention(norm(x), memory), then y + tanh(b) mlp(norm(y)); a = b = 0 in an untrained layer.

    Alayrac et al. 2022 (2204.14198), section 2.2: with zero gates the layer is the identity, and its first gradients
    reach the gates alone.
    """

    attention: CrossAttention = CrossAttention()
    """what reads the images"""
    mlp: FeedForward = MLP()
    """what is computed at each token"""
    norm: Norm = LayerNorm()
    """normalisation of each branch"""

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Fields that do not fit a model of this width."""
        return ((f"attention.{field}", why) for field, why in self.attention.problems_at(d_model))

    def flops_per_token(self, d_model: int, source: int) -> float:
        """Of a training step: 6 a weight, 3 times the forward pass of the mixing with `source` states."""
        weights = self.attention.matmul_params(d_model) + self.mlp.matmul_params(d_model)
        return 6 * weights + 3 * self.attention.mixing_flops(d_model, source)


class GatedCrossAttentionModule(nn.Module):
    """Owns `attention`, `mlp`, their norms and gates; sites attention_out, mlp_out (both gated)."""

    config: GatedCrossAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context
    ) -> Float[Array, "batch length d_model"]:
        """Run the layer on residual stream `x`, over `context.memory`."""
        c, sizes = self.config, (self.d_model, self.layers, self.initializer)
        for name, part in (("attention", c.attention), ("mlp", c.mlp)):
            gate = parameter(self, f"{name}_gate", jax.nn.initializers.zeros, (), ())
            y = part.build(*sizes, name=name)(c.norm.build(f"{name}_norm")(x), context)
            x = x + site(self, f"{name}_out", jnp.tanh(gate) * y)
        return x


@dataclass(frozen=True)
class Flamingo(Model):
    """A language model with a gated cross-attention layer before each repeat of its pattern. 2204.14198.

    Every token sees all patches of its row's one image. (Not here: the Perceiver resampler, and several images a row.)
    A pattern of n blocks has the gated layer before every n-th block. The language model's parameters are those of the
    model alone, at `language`, with the layers' at `language/blocks/gated`: train the latter, `projector` and nothing
    else by freezing the rest (an optimizer group).
    """

    vision: ViT = ViT(classes=None)
    """the image encoder"""
    projector: Projector = Projector(depth=1)
    """what leads from its width to the language model's"""
    gated: GatedCrossAttention = GatedCrossAttention()
    """the layers between the two"""
    language: Decoder = Decoder()
    """the language model"""

    @property
    def vocab(self) -> int:
        """Token ids of the language model."""
        return self.language.vocab

    def build(self) -> "FlamingoModule":
        """The Linen module of this config."""
        return FlamingoModule(self)

    def example(self) -> dict[str, Any]:
        """One token and one black image."""
        return self.language.example() | self.vision.example()

    def problems(self) -> Iterator[tuple[str, str]]:
        """A head that nothing reads, gated layers that do not fit, stacks that they have no place in."""
        if self.vision.classes is not None:
            yield "vision.classes", "makes a head that the language model does not read: use None"
        yield from ((f"gated.{field}", why) for field, why in self.gated.problems_at(self.language.d_model))
        if any(block.order == "reversible" for block in self.language.pattern):
            yield "language.pattern", "must have one residual stream: gated layers have no place in reversible blocks"

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> dict[str, Any]:
        """Empty decode state of the language model; every call is given the images."""
        return self.language.init_state(batch, length, dtype)

    def flops_per_token(self, length: int) -> float:
        """The language model's, the gated layers', and those of a row's image spread over its `length` tokens."""
        width, patches = self.language.d_model, self.vision.tokens - 1
        projector = 6 * patches * self.projector.matmul_params(self.vision.d_model, width)
        gated = self.language.repeats * self.gated.flops_per_token(width, patches)
        image = (self.vision.flops_per_image() + projector) / length
        return self.language.flops_per_token(length) + gated + image

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """The language model's."""
        return self.language.kv_bytes_per_token(dtype)


class FlamingoModule(nn.Module):
    """Owns `vision`, `projector` and `language`."""

    config: Flamingo

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        state: dict[str, Any] | None = None,
        deterministic: bool = True,
        prefix: Bool[Array, "batch length"] | None = None,
        images: Float[Array, "batch side side channels"] | None = None,
    ) -> tuple[Features, dict[str, Any] | None]:
        """The language model's features and decode state; without images the gated layers are passed by."""
        c, memory = self.config, None
        if images is not None:
            states = ViTModule(c.vision, name="vision").features(images, deterministic)[0].hidden[:, 1:]
            project = ProjectorModule(c.projector, c.language.d_model, c.language.initializer, name="projector")
            memory = Memory(project(states))
        language = GatedDecoderModule(c.language, c.gated, memory, name="language")
        return language.features(tokens, positions, segment_ids, state, deterministic, prefix)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        state: dict[str, Any] | None = None,
        deterministic: bool = True,
        prefix: Bool[Array, "batch length"] | None = None,
        images: Float[Array, "batch side side channels"] | None = None,
    ) -> tuple[Float[Array, "batch length vocab"], dict[str, Any] | None]:
        """Float32 logits of the next token at every position, and the decode state."""
        features, state = self.features(tokens, positions, segment_ids, state, deterministic, prefix, images)
        return readout(features), state


class GatedDecoderModule(DecoderModule):
    """A decoder with gated layers in its stack."""

    gated: GatedCrossAttention
    memory: Memory | None

    def through_blocks(
        self, x: Float[Array, "batch length d_model"], context: Context, state: dict[str, Any] | None
    ) -> tuple[Float[Array, "batch length d_model"], dict[str, Any] | None]:
        """All blocks and, where there is a memory, the gated layers between them."""
        return super().through_blocks(x, replace(context, memory=self.memory), state)

    def body(self) -> tuple[type[nn.Module], tuple[Any, ...]]:
        """The module of one repeat, a gated layer before it where there is a memory, and what it is made from."""
        return super().body() if self.memory is None else (GatedRepeat, (self.gated,))


class GatedRepeat(Repeat):
    """One gated layer and one repeat of the pattern, in the form that nn.scan carries."""

    gated: GatedCrossAttention

    @nn.compact
    def __call__(self, x: Any, context: Context, state: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
        """Run the gated layer, then the blocks."""
        c = self.config
        layer = remembering(c, GatedCrossAttentionModule)
        x = layer(self.gated, c.d_model, c.layers, c.initializer, name="gated")(x, context)
        return super().__call__(x, context, state)
