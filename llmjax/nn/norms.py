"""Normalisation layers. Statistics are float32 whatever the input's dtype; the result has the input's dtype."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.nn.linear import parameter


@dataclass(frozen=True)
class Norm:
    """Base of the normalisations."""

    def build(self, name: str | None = None) -> nn.Module:
        """The Linen module of this config, `[..., features] -> [..., features]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * scale. Zhang and Sennrich 2019 (1910.07467)."""

    eps: float = 1e-6
    """added to the mean square (LLaMA)"""
    zero_centred: bool = False
    """whether the factor is 1 + scale, with scale from 0 (Gemma, 2403.08295)"""

    def build(self, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return RMSNormModule(self, name=name)


class RMSNormModule(nn.Module):
    """Shell of `rms_norm` that owns `scale`."""

    config: RMSNorm

    @nn.compact
    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        """Normalise the last axis."""
        if self.config.zero_centred:
            shift = parameter(self, "scale", jax.nn.initializers.zeros, x.shape[-1:], ("norm",))
            return rms_norm(x, 1 + shift.astype(jnp.float32), self.config.eps)
        scale = parameter(self, "scale", jax.nn.initializers.ones, x.shape[-1:], ("norm",))
        return rms_norm(x, scale, self.config.eps)


def rms_norm(
    x: Float[Array, "... features"], scale: Float[Array, " features"], eps: float
) -> Float[Array, "... features"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


@dataclass(frozen=True)
class LayerNorm(Norm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias. Ba et al. 2016 (1607.06450)."""

    eps: float = 1e-5
    """added to the variance (GPT-2)"""
    bias: bool = True
    """whether a learned shift is added"""

    def build(self, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return LayerNormModule(self, name=name)


class LayerNormModule(nn.Module):
    """Shell of `layer_norm` that owns `scale` and `bias`."""

    config: LayerNorm

    @nn.compact
    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        """Normalise the last axis."""
        scale = parameter(self, "scale", jax.nn.initializers.ones, x.shape[-1:], ("norm",))
        bias = None
        if self.config.bias:
            bias = parameter(self, "bias", jax.nn.initializers.zeros, x.shape[-1:], ("norm",))
        return layer_norm(x, scale, bias, self.config.eps)


def layer_norm(
    x: Float[Array, "... features"],
    scale: Float[Array, " features"],
    bias: Float[Array, " features"] | None,
    eps: float,
) -> Float[Array, "... features"]:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * scale
    return (wide if bias is None else wide + bias).astype(x.dtype)
