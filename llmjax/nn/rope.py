"""Rotary position embedding: query and key planes turn with position, so scores depend on differences only."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Rope:
    """Plane i of a head turns by position * base^(-2 i / head_dim). Su et al. 2021 (2104.09864)."""

    base: float = 10000.0
    """wavelength base (10,000 in the paper and LLaMA 1 and 2; 500,000 in Llama 3)"""
    layout: Literal["half", "interleaved"] = "half"
    """plane i is features (i, i + head_dim/2) (LLaMA in transformers) or (2i, 2i + 1) (the paper, GPT-J)"""


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"], config: Rope
) -> Float[Array, "batch length heads head_dim"]:
    """Turn every plane of `x` by its angle at `positions`; angles in float32, result in the dtype of `x`."""
    cos, sin = rope_tables(positions, x.shape[-1], config.base)
    wide = x.astype(jnp.float32)
    if config.layout == "half":
        a, b = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return turned.astype(x.dtype)


def rope_tables(
    positions: Int[Array, "batch length"], head_dim: int, base: float
) -> tuple[Float[Array, "batch length 1 planes"], Float[Array, "batch length 1 planes"]]:
    """Cosine and sine of position * base^(-2 i / head_dim), float32, with an axis to broadcast over heads."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
