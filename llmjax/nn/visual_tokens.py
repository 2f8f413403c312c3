"""Visual tokens: image features, projected to a language model's width, stand where its image tokens stood."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.decoder import Decoder, DecoderModule
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mixer import Context
from llmjax.nn.model import Features, Model, readout
from llmjax.nn.sites import site
from llmjax.nn.vit import ViT, ViTModule


@dataclass(frozen=True)
class Projector:
    """From image features to a language model's width: W x + b, or W2 gelu(W1 x + b1) + b2."""

    depth: int = 2
    """projections (LLaVA, 2304.08485: 1; LLaVA-1.5, 2310.03744: 2), with GELU between them"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """No projection."""
        if self.depth < 1:
            yield "depth", "must be at least 1"

    def matmul_params(self, inputs: int, outputs: int) -> int:
        """Weights that multiply each visual token."""
        return (inputs + (self.depth - 1) * outputs) * outputs


class ProjectorModule(nn.Module):
    """Owns the projections `0`, `1`, ...; site projected."""

    config: Projector
    d_model: int
    initializer: Init

    @nn.compact
    def __call__(self, x: Float[Array, "batch visual features"]) -> Float[Array, "batch visual d_model"]:
        """Project each visual token."""
        for i in range(self.config.depth):
            x = jax.nn.gelu(x, approximate=False) if i else x
            inputs = x.shape[-1]
            axes, kernel = ("d_model" if i == 0 else None, "d_model" if i else None), self.initializer.kernel(inputs)
            x = Linear((inputs,), (self.d_model,), axes, kernel, bias=True, name=str(i))(x)
        return site(self, "projected", x)


@dataclass(frozen=True)
class LLaVA(Model):
    """language(embeddings, with projector(vision(image)) at the image tokens). Liu et al. 2023 (2304.08485).

    A row has one image; its class token is left out. (LLaVA reads CLIP's last layer but one: a tower with one layer
    fewer and norm=None.) Rows without image tokens are text alone, and `images` may be left out altogether.
    """

    vision: ViT = ViT(classes=None)
    """the image encoder"""
    projector: Projector = Projector()
    """what leads from its width to the language model's"""
    language: Decoder = Decoder()
    """the language model"""
    image_token: int = 0
    """token id that image features replace; a row has as many as the image has patches, or none"""

    @property
    def vocab(self) -> int:
        """Token ids of the language model."""
        return self.language.vocab

    @property
    def visual_tokens(self) -> int:
        """Vectors of an image."""
        return self.vision.tokens - 1

    def build(self) -> "LLaVAModule":
        """The Linen module of this config."""
        return LLaVAModule(self)

    def example(self) -> dict[str, Any]:
        """One token and one black image."""
        return self.language.example() | self.vision.example()

    def problems(self) -> Iterator[tuple[str, str]]:
        """A head that nothing reads, a token that does not exist."""
        if self.vision.classes is not None:
            yield "vision.classes", "makes a head that the language model does not read: use None"
        if not 0 <= self.image_token < self.language.vocab:
            yield "image_token", f"must be one of the {self.language.vocab} token ids"

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> dict[str, Any]:
        """Empty decode state of the language model; images belong to the first call."""
        return self.language.init_state(batch, length, dtype)

    def flops_per_token(self, length: int) -> float:
        """The language model's, and those of a row's image spread over its `length` tokens."""
        projector = 6 * self.visual_tokens * self.projector.matmul_params(self.vision.d_model, self.language.d_model)
        return self.language.flops_per_token(length) + (self.vision.flops_per_image() + projector) / length

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """The language model's."""
        return self.language.kv_bytes_per_token(dtype)


class LLaVAModule(nn.Module):
    """Owns `vision`, `projector` and `language`, whose parameters are those of the models alone."""

    config: LLaVA

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
        """The language model's features and decode state, its image tokens replaced where there are images."""
        c, visual = self.config, None
        if images is not None:
            states = ViTModule(c.vision, name="vision").features(images, deterministic)[0].hidden[:, 1:]
            visual = ProjectorModule(c.projector, c.language.d_model, c.language.initializer, name="projector")(states)
        language = SplicedDecoderModule(c.language, visual, tokens == c.image_token, name="language")
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


class SplicedDecoderModule(DecoderModule):
    """A decoder with vectors of its own at some tokens."""

    visual: Float[Array, "batch visual d_model"] | None
    at: Bool[Array, "batch length"]

    def hidden(
        self, x: Float[Array, "batch length d_model"], context: Context, state: dict[str, Any] | None
    ) -> tuple[Float[Array, "batch length d_model"], dict[str, Any] | None]:
        """The stack, after the vectors are put in: absolute positions are added to them too."""
        return super().hidden(x if self.visual is None else splice(x, self.visual, self.at), context, state)


def splice(
    x: Float[Array, "batch length d_model"],
    visual: Float[Array, "batch visual d_model"],
    at: Bool[Array, "batch length"],
) -> Float[Array, "batch length d_model"]:
    """x with visual[0], visual[1], ... at the tokens that `at` marks, in their order.

    Shapes are static under jit, so that numbers which do not match are no error here: more marks than vectors repeat
    the last one, vectors too many are left out. `llmjax.data.visual_dialogue.check_image_tokens` looks on the host.
    """
    index = jnp.clip(jnp.cumsum(at, axis=1) - 1, 0, visual.shape[1] - 1)
    return jnp.where(at[..., None], jnp.take_along_axis(visual, index[..., None], axis=1).astype(x.dtype), x)
