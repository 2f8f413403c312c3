"""Rotary position embedding: query and key planes turn with position, so scores depend on differences only."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmjax.nn.rope_scaling import RopeScaling, plain_frequencies


@dataclass(frozen=True)
class Rope:
    """Plane i of the d turned features turns by position * base^(-2 i / d). Su et al. 2021 (2104.09864)."""

    base: float = 10000.0
    """wavelength base (10,000 in the paper and LLaMA 1 and 2; 500,000 in Llama 3)"""
    layout: Literal["half", "interleaved"] = "half"
    """plane i is features (i, i + d/2) (LLaMA in transformers) or (2i, 2i + 1) (the paper, GPT-J)"""
    fraction: float = 1.0
    """first part of head_dim that turns (GPT-NeoX 20B: 0.25; Phi-2: 0.4)"""
    scaling: RopeScaling | None = None
    """rule for sequences longer than the trained ones"""
    sections: tuple[int, ...] | None = None
    """planes for each axis of positions `[batch, length, axes]` (M-RoPE, Wang et al. 2024, 2409.12191: 16, 24, 24)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that fit no head."""
        if self.base <= 1:
            yield "base", "must be above 1"
        if not 0 < self.fraction <= 1:
            yield "fraction", "must be above 0 and at most 1"
        if self.sections is not None and min(self.sections, default=0) < 1:
            yield "sections", "must be at least one plane for each axis, or None for one axis"

    def problems_at(self, head_dim: int) -> Iterator[tuple[str, str]]:
        """Fields that do not fit heads of so many features."""
        planes = self.rotated(head_dim) // 2
        if abs(self.fraction * head_dim - 2 * planes) > 1e-6 * head_dim or planes == 0:
            yield "fraction", f"turns {self.fraction * head_dim:g} of {head_dim} features: it must be an even number"
            return
        if self.sections is not None and sum(self.sections) != planes:
            yield "sections", f"add up to {sum(self.sections)} planes where {planes} turn"
        if self.scaling is not None:
            yield from ((f"scaling.{field}", why) for field, why in self.scaling.problems_at(planes))

    def rotated(self, head_dim: int) -> int:
        """Features of a head that turn."""
        return round(self.fraction * head_dim)


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length *axes"], config: Rope
) -> Float[Array, "batch length heads head_dim"]:
    """Turn every plane of `x` by its angle at `positions`; angles in float32, result in the dtype of `x`.

    The features that turn are multiplied by the magnitude of the scaling, if there is one; the others stay as they are.
    Raises ValueError where positions have several axes, and not as many as there are sections.
    """
    turning = config.rotated(x.shape[-1])
    cos, sin = rope_tables(positions, turning, config)
    wide = x[..., :turning].astype(jnp.float32)
    if config.layout == "half":
        a, b = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(wide.shape)
    return jnp.concatenate([turned.astype(x.dtype), x[..., turning:]], axis=-1)


def rope_tables(
    positions: Int[Array, "batch length *axes"], features: int, config: Rope
) -> tuple[Float[Array, "batch length 1 planes"], Float[Array, "batch length 1 planes"]]:
    """Cosine and sine of every plane's angle times the magnitude, float32, with an axis to broadcast over heads."""
    planes, scaling = features // 2, config.scaling
    plain = (plain_frequencies(config.base, planes), 1.0)
    frequencies, magnitude = plain if scaling is None else scaling.frequencies(config.base, planes, positions)
    where = by_plane(positions, config.sections).astype(jnp.float32)
    angles = where * jnp.asarray(frequencies, jnp.float32)[..., None, :]
    return magnitude * jnp.cos(angles)[:, :, None], magnitude * jnp.sin(angles)[:, :, None]


def by_plane(
    positions: Int[Array, "batch length *axes"], sections: tuple[int, ...] | None
) -> Int[Array, "batch length #planes"]:
    """The position that every plane turns by: the one there is, or that of its section's axis."""
    if positions.ndim == 2:
        return positions[..., None]
    if sections is None or positions.shape[-1] != len(sections):
        raise ValueError(f"positions with {positions.shape[-1]} axes need as many rope.sections, not {sections}")
    return positions[..., np.repeat(np.arange(len(sections)), sections)]
