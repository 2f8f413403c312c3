"""Absolute positions: vectors added to the token embeddings. (Rotary ones belong to attention: `llmjax.nn.rope`.)"""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmjax.config import InputError
from llmjax.nn.initializers import Init
from llmjax.nn.linear import parameter


@dataclass(frozen=True)
class Positions:
    """Base of the absolute position encodings."""

    def build(self, d_model: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module, positions `[batch, length]` -> vectors `[batch, length, d_model]`."""
        raise NotImplementedError

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Field and reason for each value that does not fit a model of this width."""
        return iter(())


@dataclass(frozen=True)
class LearnedPositions(Positions):
    """A trained table of `length` vectors. Radford et al. 2019."""

    length: int = 1024
    """number of positions (GPT-2: 1024); longer input is a config error"""

    def build(self, d_model: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return LearnedPositionsModule(self, d_model, init, name=name)


class LearnedPositionsModule(nn.Module):
    """Owns the table; padding (position -1) reads row 0, which nothing attends to."""

    config: LearnedPositions
    d_model: int
    initializer: Init

    @nn.compact
    def __call__(self, positions: Int[Array, "batch length"]) -> Float[Array, "batch length d_model"]:
        """Look up the vectors of `positions`; raises InputError where the input is longer than the table."""
        if positions.shape[1] > self.config.length:
            raise InputError(f"length {positions.shape[1]} exceeds the {self.config.length} learned positions")
        shape = (self.config.length, self.d_model)
        table = parameter(self, "embedding", self.initializer.embedding(), shape, ("positions", "d_model"))
        return jnp.take(table, jnp.maximum(positions, 0), axis=0, mode="clip")


@dataclass(frozen=True)
class SinusoidalPositions(Positions):
    """Fixed vectors: sines in the first half of the features, cosines in the second. Vaswani 2017 (1706.03762)."""

    base: float = 10000.0
    """ratio of the longest to the shortest wavelength (the paper)"""

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """A width without room for pairs."""
        if d_model % 2:
            yield "base", f"makes pairs of sine and cosine: d_model={d_model} must be even"

    def build(self, d_model: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return SinusoidalPositionsModule(self, d_model, name=name)


class SinusoidalPositionsModule(nn.Module):
    """Shell of `sinusoids`; holds no parameters."""

    config: SinusoidalPositions
    d_model: int

    @nn.compact
    def __call__(self, positions: Int[Array, "batch length"]) -> Float[Array, "batch length d_model"]:
        """Compute the vectors of `positions`."""
        return sinusoids(positions, self.d_model, self.config.base)


def sinusoids(positions: Int[Array, "batch length"], d_model: int, base: float) -> Float[Array, "batch length d_model"]:
    """sin and cos of position * base^(-2 i / d_model), i < d_model / 2, float32; rows have norm sqrt(d_model / 2)."""
    frequencies = base ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
