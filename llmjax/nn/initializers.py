"""Weight initialisation schemes, as configs that hand initialisers to the modules of a model."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

Initializer = Callable[..., Float[Array, "..."]]


@dataclass(frozen=True)
class Init:
    """Base of the schemes. `kernel` is for projections, `residual` for those that write into the residual stream."""

    def kernel(self, inputs: int) -> Initializer:
        """Initialiser of a projection that reads `inputs` features."""
        raise NotImplementedError

    def residual(self, inputs: int, layers: int) -> Initializer:
        """Initialiser of a projection that writes into the residual stream of a model of `layers` layers."""
        raise NotImplementedError

    def embedding(self) -> Initializer:
        """Initialiser of token and position tables."""
        raise NotImplementedError


@dataclass(frozen=True)
class GPT2Init(Init):
    """Normal with one standard deviation; residual projections divided by sqrt(2 layers). Radford et al. 2019."""

    std: float = 0.02
    """standard deviation of every kernel and table (GPT-2 code)"""

    def kernel(self, inputs: int) -> Initializer:
        """N(0, std^2)."""
        return jax.nn.initializers.normal(self.std)

    def residual(self, inputs: int, layers: int) -> Initializer:
        """N(0, std^2 / (2 layers)): two branches a layer keep the residual stream's variance independent of depth."""
        return jax.nn.initializers.normal(self.std / math.sqrt(2 * layers))

    def embedding(self) -> Initializer:
        """N(0, std^2)."""
        return jax.nn.initializers.normal(self.std)


@dataclass(frozen=True)
class LlamaInit(Init):
    """Normal with one standard deviation for every matrix, residual ones included. Touvron et al. 2023 (2302.13971)."""

    std: float = 0.02
    """standard deviation of every kernel and table (`initializer_range` of the released configs)"""

    def kernel(self, inputs: int) -> Initializer:
        """N(0, std^2)."""
        return jax.nn.initializers.normal(self.std)

    def residual(self, inputs: int, layers: int) -> Initializer:
        """N(0, std^2): no scaling by depth."""
        return jax.nn.initializers.normal(self.std)

    def embedding(self) -> Initializer:
        """N(0, std^2)."""
        return jax.nn.initializers.normal(self.std)


@dataclass(frozen=True)
class FanInInit(Init):
    """Truncated normal of variance gain / inputs (LeCun et al. 1998); residual projections start at zero."""

    gain: float = 1.0
    """variance of a projection's output for unit-variance input"""
    embedding_std: float = 0.02
    """standard deviation of token and position tables"""

    def kernel(self, inputs: int) -> Initializer:
        """Truncated N(0, gain / inputs), the truncation's loss of variance made good."""
        stddev = math.sqrt(self.gain / inputs) / 0.87962566103423978
        return jax.nn.initializers.truncated_normal(stddev)

    def residual(self, inputs: int, layers: int) -> Initializer:
        """Zero, so that the stack starts as the identity."""
        return jax.nn.initializers.zeros

    def embedding(self) -> Initializer:
        """N(0, embedding_std^2)."""
        return jax.nn.initializers.normal(self.embedding_std)
