"""Bottleneck adapters: a narrow feed-forward layer added to what a block's mixer or feed-forward layer returns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Adapter, Boxes, Call, boxed
from llmjax.nn.mlp import Activation, activation

Place = Literal["mixer", "cross", "mlp"]


@dataclass(frozen=True)
class Bottleneck(Adapter):
    """y' = y + s (f(r A + a) B + b), y = layer(x), r = y, or x where parallel; A `[d, size]`, B `[size, d]`.

    Houlsby et al. 2019 (1902.00751): after both layers of a block; Pfeiffer et al. 2021 (2005.00247): places=("mlp",);
    parallel: He et al. 2022 (2110.04366), s = 4. B begins at zero, so that it starts as the identity.
    """

    size: int = 64
    """width of the bottleneck"""
    places: tuple[Place, ...] = ("mixer", "mlp")
    """layers of a block that have one, by the name of their module"""
    parallel: bool = False
    """whether it reads what the layer reads, and not what it returns"""
    activation: Activation = "relu"
    """element-wise function f"""
    scale: float = 1.0
    """what multiplies the change"""
    dropout: float = 0.0
    """probability that a feature of its input is dropped in training"""

    def finds(self, module: nn.Module, path: str, method: str) -> bool:
        """Calls of the layers in `places`."""
        return method == "__call__" and path.rpartition("/")[2] in self.places

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """A uniform in +-1/sqrt(d_model), all else zero."""
        d: int = module.d_model  # every layer of a block has it
        limit = d**-0.5
        return {
            "down": boxed(jax.random.uniform(key, (d, self.size), minval=-limit, maxval=limit), "d_model", "rank"),
            "down_bias": boxed(jnp.zeros(self.size), "rank"),
            "up": boxed(jnp.zeros((self.size, d)), "rank", "d_model"),
            "up_bias": boxed(jnp.zeros(d), "d_model"),
        }

    def around(self, call: Call) -> Any:
        """The layer's output and what the adapter adds, in training and decoding alike: each token for itself."""
        result = call.make()
        y = first(result)
        read = call.dropout(call.args[0] if self.parallel else y, self.dropout)
        return with_first(result, y + self.scale * self.change(call, read).astype(y.dtype))

    def change(self, call: Call, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_model"]:
        """f(x A + a) B + b."""
        p = call.params
        return activation(self.activation)(x @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.size < 1:
            yield "size", "must be at least 1"
        if not self.places:
            yield "places", "is empty: name at least one of mixer, cross and mlp"
        if not 0 <= self.dropout < 1:
            yield "dropout", "must be at least 0 and below 1"


def first(result: Any) -> Float[Array, "..."]:
    """The activations that a layer returns, of mixers before their state."""
    return result[0] if isinstance(result, tuple) else result


def with_first(result: Any, y: Float[Array, "..."]) -> Any:
    """What a layer returns, its activations replaced."""
    return (y, *result[1:]) if isinstance(result, tuple) else y
