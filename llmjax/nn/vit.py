"""Vision transformer: an image is a sequence of patches, its class the readout of one more token."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context
from llmjax.nn.mlp import MLP
from llmjax.nn.model import Model
from llmjax.nn.norms import LayerNorm, Norm
from llmjax.nn.positions import LearnedPositions, Positions
from llmjax.nn.sites import site
from llmjax.nn.stack import Stack, StackModule


@struct.dataclass
class ImageFeatures:
    """States of the class token (first) and the patches after the last norm, and the logits of the classes, if any.

    `losses` and `metrics` are what layers hand out, as in `llmjax.nn.model.Features`.
    """

    hidden: Float[Array, "batch tokens d_model"]
    logits: Float[Array, "batch classes"] | None = None
    losses: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)
    metrics: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)


@dataclass(frozen=True)
class ViT(Stack, Model):
    """logits = head(norm(blocks([class; patches W + b] + positions))[class]). Dosovitskiy et al. 2020 (2010.11929).

    An image has (side / patch)^2 patches, each a token of patch^2 channels numbers, row by row.
    """

    side: int = 32
    """pixels along each edge of an image"""
    patch: int = 4
    """pixels along each edge of a patch, a divisor of side (the paper: 16)"""
    channels: int = 3
    """numbers a pixel"""
    classes: int | None = 10
    """what the head tells apart; None for an encoder without a head"""
    patch_bias: bool = True
    """whether the projection of patches has a bias (CLIP's has none)"""
    pattern: tuple[Block, ...] = (
        Block(
            mixer=Attention(causal=False, rope=None, bias=True, out_bias=True),
            mlp=MLP(activation="gelu", bias=True),
            norm=LayerNorm(eps=1e-6),
        ),
    )
    """the blocks that are repeated"""
    norm: Norm | None = LayerNorm(eps=1e-6)
    """normalisation after the last block"""
    positions: Positions | None = LearnedPositions(65)
    """positions of the class token and the patches"""

    @property
    def tokens(self) -> int:
        """The class token and the patches."""
        return 1 + (self.side // self.patch) ** 2

    def build(self) -> "ViTModule":
        """The Linen module of this config."""
        return ViTModule(self)

    def example(self) -> dict[str, Float[Array, "batch side side channels"]]:
        """One black image."""
        return {"images": jnp.zeros((1, self.side, self.side, self.channels))}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes that do not fit each other."""
        yield from super().problems()
        for name in ("side", "patch", "channels"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
        if self.patch > 0 and self.side % self.patch:
            yield "patch", f"must divide side={self.side}"
        elif self.patch > 0 and isinstance(self.positions, LearnedPositions) and self.positions.length != self.tokens:
            yield "positions.length", f"must be {self.tokens}: the class token and the patches"
        if self.classes is not None and self.classes < 1:
            yield "classes", "must be at least 1, or None for an encoder without a head"

    def generates(self) -> bool:
        """No: it reads images."""
        return False

    def flops_per_image(self) -> float:
        """Model FLOPs of one training step on an image: 6 for each weight and token, 3 times the mixing's forward."""
        per_token = 6 * self.matmul_params() + 3 * self.mixing_flops(self.tokens)
        embedding = 6 * (self.tokens - 1) * self.patch**2 * self.channels * self.d_model
        return self.tokens * per_token + embedding + 6 * self.d_model * (self.classes or 0)

    def flops_per_token(self, length: int) -> float:
        """An image's FLOPs spread over the `length` tokens that its row of a batch counts for."""
        return self.flops_per_image() / length

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """None: nothing is decoded."""
        return 0


class ViTModule(StackModule):
    """Owns `patch`, `class_token`, the stack's parts and perhaps `head`; site patches, and the stack's."""

    config: ViT

    @nn.compact
    def features(
        self, images: Float[Array, "batch side side channels"], deterministic: bool = True
    ) -> tuple[ImageFeatures, None]:
        """States and logits, and no decode state; raises ValueError where the images have another size."""
        c = self.config
        if images.shape[1:] != (c.side, c.side, c.channels):
            raise ValueError(f"images of {images.shape[1:]} given to a ViT of side={c.side}, channels={c.channels}")
        inputs, init = c.patch**2 * c.channels, c.initializer
        first = parameter(self, "class_token", init.embedding(), (c.d_model,), ("d_model",))
        project = Linear((inputs,), (c.d_model,), (None, "d_model"), init.kernel(inputs), c.patch_bias, name="patch")
        x = site(self, "patches", project(patchify(images, c.patch).astype(first.dtype)))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.d_model)), x], axis=1)
        positions = jnp.broadcast_to(jnp.arange(c.tokens, dtype=jnp.int32), x.shape[:2])
        x, _ = self.hidden(x, Context(positions, deterministic=deterministic), None)
        if c.classes is None:
            return ImageFeatures(x), None
        kernel, axes = init.kernel(c.d_model), ("d_model", "vocab")
        logits = Linear((c.d_model,), (c.classes,), axes, kernel, bias=True, name="head")(x[:, 0])
        return ImageFeatures(x, logits.astype(jnp.float32)), None

    def __call__(
        self, images: Float[Array, "batch side side channels"], deterministic: bool = True
    ) -> tuple[Float[Array, "batch classes"] | None, None]:
        """Float32 logits of the classes (None without a head), and no decode state."""
        features, _ = self.features(images, deterministic)
        return features.logits, None


def patchify(images: Float[Array, "batch height width channels"], patch: int) -> Float[Array, "batch patches features"]:
    """Patches row by row, each flattened as `[row, column, channel]`."""
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(
    patches: Float[Array, "batch patches features"], patch: int, rows: int
) -> Float[Array, "batch height width channels"]:
    """The images of which `patchify` made these patches, `rows` of them below each other."""
    return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=patch, q=patch)
