"""CLIP: an image and a text encoder that meet in one space, where a pair's cosine is its logit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mlp import MLP
from llmjax.nn.model import Model
from llmjax.nn.norms import LayerNorm
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.sites import site
from llmjax.nn.vit import ViT

TEXT = Decoder(
    pattern=(
        Block(
            mixer=Attention(rope=None, bias=True, out_bias=True),
            mlp=MLP(activation="gelu_quick", bias=True),
            norm=LayerNorm(),
        ),
    ),
    norm=LayerNorm(),
    positions=LearnedPositions(77),
    tied=True,
)
"""A causal text tower as the paper has it, small."""
VISION = ViT(
    classes=None,
    patch_bias=False,
    embedding_norm=LayerNorm(),
    pattern=(
        Block(
            mixer=Attention(causal=False, rope=None, bias=True, out_bias=True),
            mlp=MLP(activation="gelu_quick", bias=True),
            norm=LayerNorm(),
        ),
    ),
    norm=LayerNorm(),
)
"""An image tower as the paper has it, small."""


@struct.dataclass
class Joint:
    """Unit vectors of images and texts in the joint space, float32, and the factor that makes their cosines logits.

    `losses` and `metrics` are what layers hand out, as in `llmjax.nn.model.Features`.
    """

    images: Float[Array, "images d_joint"]
    texts: Float[Array, "texts d_joint"]
    scale: Float[Array, ""]
    losses: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)
    metrics: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)


@dataclass(frozen=True)
class CLIP(Model):
    """logits[i, j] = exp(t) <f(image_i) / |f(image_i)|, g(text_j) / |g(text_j)|>. Radford et al. 2021 (2103.00020).

    f projects the image tower's class token, g the text tower's state at the text's end; t is learned.
    """

    vision: ViT = VISION
    """the image tower"""
    text: Decoder = TEXT
    """the text tower; its head, tied to the embeddings, is not used"""
    d_joint: int = 64
    """features of the joint space"""
    end_token: int = 1
    """token id that ends a text; the text is read off at its first occurrence, and what follows is padding"""
    temperature: float = 0.07
    """exp(-t) of an untrained model (the paper)"""
    max_scale: float = 100.0
    """bound of exp(t) (the paper)"""

    @property
    def vocab(self) -> int:
        """Token ids of the text tower."""
        return self.text.vocab

    def build(self) -> "CLIPModule":
        """The Linen module of this config."""
        return CLIPModule(self)

    def example(self) -> dict[str, Any]:
        """One token and one black image."""
        return {"tokens": jnp.zeros((1, 1), jnp.int32)} | self.vision.example()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Parts that nothing would read, values out of range."""
        if self.vision.classes is not None:
            yield "vision.classes", "makes a head that CLIP does not read: use None"
        if not self.text.tied:
            yield "text.tied", "must be True: CLIP reads no head of the text tower"
        for name in ("mixture", "multi_token"):
            if getattr(self.text, name) is not None:
                yield f"text.{name}", "belongs to a head, and CLIP reads none of the text tower: use None"
        if self.d_joint < 1:
            yield "d_joint", "must be at least 1"
        if not 0 <= self.end_token < self.text.vocab:
            yield "end_token", f"must be one of the {self.text.vocab} token ids"
        if not 0 < 1 / self.max_scale <= self.temperature:
            yield "temperature", f"must be at least 1 / max_scale = {1 / self.max_scale:.3g}"

    def generates(self) -> bool:
        """No: it compares texts, it writes none."""
        return False

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs of a training step on a pair, spread over the `length` tokens of its text.

        The products of a batch's images with its texts are left out: one product of d_joint numbers a pair.
        """
        text = self.text.flops_per_token(length) - 6 * self.text.d_model * self.text.vocab
        heads = 6 * self.d_joint * (self.vision.d_model + self.text.d_model)
        return text + (self.vision.flops_per_image() + heads) / length

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """None: nothing is decoded."""
        return 0


class CLIPModule(nn.Module):
    """Owns `vision`, `text`, `image_projection`, `text_projection`, `log_scale`; sites image_pooled, text_pooled."""

    config: CLIP

    def setup(self) -> None:
        """Both towers, their projections, and t."""
        c = self.config
        self.vision, self.text = c.vision.build(), c.text.build()
        self.image_projection, self.text_projection = (
            Linear((tower.d_model,), (c.d_joint,), ("d_model", None), tower.initializer.kernel(tower.d_model))
            for tower in (c.vision, c.text)
        )
        initial = jax.nn.initializers.constant(-math.log(c.temperature))
        self.log_scale = parameter(self, "log_scale", initial, (), ())

    def encode_images(
        self, images: Float[Array, "images side side channels"], deterministic: bool = True
    ) -> Float[Array, "images d_joint"]:
        """Unit vectors of images."""
        states = self.vision.features(images, deterministic)[0].hidden
        return unit(self.image_projection(site(self, "image_pooled", states[:, 0])))

    def encode_texts(
        self, tokens: Int[Array, "texts length"], deterministic: bool = True
    ) -> Float[Array, "texts d_joint"]:
        """Unit vectors of texts."""
        states = self.text.features(tokens, deterministic=deterministic)[0].hidden
        end = jnp.argmax(tokens == self.config.end_token, axis=1)
        pooled = jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]
        return unit(self.text_projection(site(self, "text_pooled", pooled)))

    def features(
        self,
        tokens: Int[Array, "texts length"],
        images: Float[Array, "images side side channels"],
        deterministic: bool = True,
    ) -> tuple[Joint, None]:
        """Both sides in the joint space, and no decode state."""
        texts, pictures = self.encode_texts(tokens, deterministic), self.encode_images(images, deterministic)
        scale = jnp.exp(at_most(self.log_scale.astype(jnp.float32), math.log(self.config.max_scale)))
        return Joint(pictures, texts, scale), None

    def __call__(
        self,
        tokens: Int[Array, "texts length"],
        images: Float[Array, "images side side channels"],
        deterministic: bool = True,
    ) -> tuple[Float[Array, "images texts"], None]:
        """Float32 logits of every image with every text, and no decode state."""
        joint, _ = self.features(tokens, images, deterministic)
        return joint.scale * joint.images @ joint.texts.T, None


def unit(x: Float[Array, "... features"]) -> Float[Array, "... features"]:
    """x / |x| over the last axis in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-12)


@jax.custom_vjp
def at_most(x: Float[Array, ""], bound: float) -> Float[Array, ""]:
    """min(x, bound); descent is not led further up beyond the bound, but always back down."""
    return jnp.minimum(x, bound)


def _forward(x: Float[Array, ""], bound: float) -> tuple[Float[Array, ""], Any]:
    return at_most(x, bound), x >= bound


def _backward(held: Any, gradient: Float[Array, ""]) -> tuple[Float[Array, ""], None]:
    return jnp.where(held & (gradient < 0), 0.0, gradient), None


at_most.defvjp(_forward, _backward)


def zero_shot_head(texts: Float[Array, "classes templates d_joint"]) -> Float[Array, "d_joint classes"]:
    """The kernel of a classifier made of texts: each class the unit mean of its templates' unit vectors (3.1.4).

    An image's unit vector times this kernel is its cosine with each class.
    """
    return unit(jnp.mean(unit(texts), axis=1)).T
