"""Position-wise feed-forward layers: the two-layer MLP and its gated relatives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.nn.initializers import Init, Initializer
from llmjax.nn.linear import Linear
from llmjax.nn.mixer import Context
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
    """Base of the feed-forward layers: `(x, context) -> y`, x and y `[batch, length, d_model]`."""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module, one of `layers` in its stack."""
        raise NotImplementedError

    def sees_future(self) -> bool:
        """Whether a token's output depends on later tokens: such a layer is for encoders."""
        return False

    def any_order(self) -> bool:
        """Whether tokens may stand in any order: each is taken for itself."""
        return True

    def matmul_params(self, d_model: int) -> int:
        """Weights that multiply each token (what FLOPs are counted from)."""
        raise NotImplementedError


class Projection(NamedTuple):
    """One y = x W + b of a dense layer: its sides, their logical axes, the distribution of W, and whether b exists."""

    inputs: int
    outputs: int
    axes: tuple[str, str]
    initial: Initializer
    bias: bool


Project = Callable[[str, Float[Array, "..."]], Float[Array, "..."]]
"""The projection of that name, applied to an array."""


@dataclass(frozen=True)
class DenseFeedForward(FeedForward, ABC):
    """y = hidden(x) W_down + b, the same weights for every token: what an expert of a mixture can be."""

    d_ff: int | None = None
    """hidden width; None is 4 d_model for an MLP (the paper), and 8/3 d_model rounded up to a multiple of 64 for a GLU,
    which are the parameters of a 4x MLP"""
    activation: Activation = "gelu_tanh"
    """element-wise function f (gelu_tanh: GPT-2; of a GLU's gate, silu: LLaMA)"""
    bias: bool = False
    """whether the projections have a bias"""

    readers: ClassVar[tuple[str, ...]]
    """Names of the projections that read x."""

    @abstractmethod
    def width(self, d_model: int) -> int:
        """Hidden width for that d_model."""

    @abstractmethod
    def hidden(self, project: Project, x: Float[Array, "... d_model"]) -> Float[Array, "... d_ff"]:
        """What `down` projects."""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return DenseModule(self, d_model, layers, init, name=name)

    def projections(self, d_model: int, layers: int, init: Init) -> dict[str, Projection]:
        """Every projection by its name."""
        width = self.width(d_model)
        into = Projection(d_model, width, ("d_model", "d_ff"), init.kernel(d_model), self.bias)
        down = Projection(width, d_model, ("d_ff", "d_model"), init.residual(width, layers), self.bias)
        return dict.fromkeys(self.readers, into) | {"down": down}

    def matmul_params(self, d_model: int) -> int:
        """d_model d_ff for each projection."""
        return (len(self.readers) + 1) * d_model * self.width(d_model)


@dataclass(frozen=True)
class MLP(DenseFeedForward):
    """y = f(x W_up + b) W_down + b. Vaswani et al. 2017 (1706.03762)."""

    readers: ClassVar[tuple[str, ...]] = ("up",)

    def width(self, d_model: int) -> int:
        """4 d_model where nothing else is said."""
        return self.d_ff or 4 * d_model

    def hidden(self, project: Project, x: Float[Array, "... d_model"]) -> Float[Array, "... d_ff"]:
        """f(x W_up + b)."""
        return activation(self.activation)(project("up", x))


@dataclass(frozen=True)
class GLU(DenseFeedForward):
    """y = (f(x W_gate) * (x W_up)) W_down: SwiGLU for silu, GeGLU for gelu. Shazeer 2020 (2002.05202)."""

    activation: Activation = "silu"
    limit: float | None = None
    """bound of x W_gate from above and of x W_up on both sides (gpt-oss, 2508.10925: 7); None for none"""
    shift: float = 0.0
    """what is added to x W_up after that (gpt-oss: 1)"""

    readers: ClassVar[tuple[str, ...]] = ("gate", "up")

    def width(self, d_model: int) -> int:
        """8/3 d_model, rounded up to a multiple of 64, where nothing else is said."""
        return self.d_ff or -(-8 * d_model // (3 * 64)) * 64

    def hidden(self, project: Project, x: Float[Array, "... d_model"]) -> Float[Array, "... d_ff"]:
        """f(x W_gate) * (x W_up), bounded and shifted where that is asked for."""
        gate, up = project("gate", x), project("up", x)
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return activation(self.activation)(gate) * (up + self.shift if self.shift else up)


class DenseModule(nn.Module):
    """Owns the projections; site `hidden` is what `down` reads."""

    config: DenseFeedForward
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context | None = None
    ) -> Float[Array, "batch length d_model"]:
        """Apply the layer to each token alone: nothing of the context matters."""
        table = self.config.projections(self.d_model, self.layers, self.initializer)

        def project(name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
            p = table[name]
            return Linear((p.inputs,), (p.outputs,), p.axes, p.initial, p.bias, name=name)(x)

        return project("down", site(self, "hidden", self.config.hidden(project, x)))
