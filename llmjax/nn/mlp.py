"""Position-wise feed-forward layers: the two-layer MLP and its gated relatives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.sites import site

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "relu", "relu2", "silu"]


def activation(name: Activation) -> Callable[[Float[Array, "..."]], Float[Array, "..."]]:
    """The element-wise function of that name.

    gelu x Phi(x), gelu_tanh its tanh form (both Hendrycks and Gimpel 2016, 1606.08415), gelu_quick x sigmoid(1.702 x),
    relu, relu2 max(x, 0)^2 (So et al. 2021, 2109.08668), silu x sigmoid(x).
    """
    return {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
        "silu": jax.nn.silu,
    }[name]


@dataclass(frozen=True)
class FeedForward:
    """Base of the feed-forward layers."""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module, `[batch, length, d_model] -> [batch, length, d_model]`, one of `layers` in its stack."""
        raise NotImplementedError

    def matmul_params(self, d_model: int) -> int:
        """Weights that multiply each token (what FLOPs are counted from)."""
        raise NotImplementedError


@dataclass(frozen=True)
class MLP(FeedForward):
    """y = f(x W_up + b) W_down + b. Vaswani et al. 2017 (1706.03762)."""

    d_ff: int | None = None
    """hidden width; None is 4 d_model (the paper)"""
    activation: Activation = "gelu_tanh"
    """element-wise function f (gelu_tanh: GPT-2)"""
    bias: bool = False
    """whether both projections have a bias"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return MLPModule(self, d_model, layers, init, name=name)

    def matmul_params(self, d_model: int) -> int:
        """2 d_model d_ff."""
        return 2 * d_model * (self.d_ff or 4 * d_model)


class MLPModule(nn.Module):
    """Owns `up` and `down`."""

    config: MLP
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_model"]:
        """Apply the layer; site `hidden` is f's output."""
        c, width = self.config, self.config.d_ff or 4 * self.d_model
        kernel = self.initializer.kernel(self.d_model)
        h = Linear((self.d_model,), (width,), ("d_model", "d_ff"), kernel, c.bias, name="up")(x)
        h = site(self, "hidden", activation(c.activation)(h))
        residual = self.initializer.residual(width, self.layers)
        return Linear((width,), (self.d_model,), ("d_ff", "d_model"), residual, c.bias, name="down")(h)


@dataclass(frozen=True)
class GLU(FeedForward):
    """y = (f(x W_gate) * (x W_up)) W_down: SwiGLU for silu, GeGLU for gelu. Shazeer 2020 (2002.05202)."""

    d_ff: int | None = None
    """hidden width; None is 8/3 d_model rounded up to a multiple of 64, the parameters of a 4x MLP"""
    activation: Activation = "silu"
    """element-wise function f of the gate (silu: LLaMA)"""
    bias: bool = False
    """whether the three projections have a bias"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return GLUModule(self, d_model, layers, init, name=name)

    def matmul_params(self, d_model: int) -> int:
        """3 d_model d_ff."""
        return 3 * d_model * self.width(d_model)

    def width(self, d_model: int) -> int:
        """Hidden width for that d_model."""
        return self.d_ff or -(-8 * d_model // (3 * 64)) * 64


class GLUModule(nn.Module):
    """Owns `gate`, `up` and `down`."""

    config: GLU
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_model"]:
        """Apply the layer; site `hidden` is the gated product."""
        c, width = self.config, self.config.width(self.d_model)
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "d_ff")
        gate = Linear((self.d_model,), (width,), axes, kernel, c.bias, name="gate")(x)
        up = Linear((self.d_model,), (width,), axes, kernel, c.bias, name="up")(x)
        h = site(self, "hidden", activation(c.activation)(gate) * up)
        residual = self.initializer.residual(width, self.layers)
        return Linear((width,), (self.d_model,), ("d_ff", "d_model"), residual, c.bias, name="down")(h)
