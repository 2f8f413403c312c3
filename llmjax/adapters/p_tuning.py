"""P-tuning: a prompt that a small network writes. Liu et al. 2021 (2103.10385)."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Adapter, Boxes, boxed
from llmjax.adapters.prompt import PromptTuning, table_of


@dataclass(frozen=True)
class PTuning(PromptTuning):
    """P = encoder(E), E `[count, d_model]`; after training P alone is kept (`folded`), a `PromptTuning`.

    The encoder is an MLP of three layers with ReLU, or a bidirectional LSTM and an MLP of two.
    """

    count: int = 10
    encoder: Literal["mlp", "lstm"] = "mlp"
    """network that writes the prompt"""
    hidden: int = 768
    """its width"""
    depth: int = 2
    """layers of the LSTM"""

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """E, and the encoder's weights; gates of an LSTM stand in the order input, forget, cell, output."""
        table, keys = table_of(module), jax.random.split(key, 3)
        d, h = table.shape[1], self.hidden
        widths = (d, h, h, d) if self.encoder == "mlp" else (2 * h, 2 * h, d)
        drawn: Boxes = {"embedding": boxed(self.begin(keys[0], table), None, "d_model")}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            drawn[f"mlp_{i}"] = linear(jax.random.fold_in(keys[1], i), inputs, outputs)
        for i in range(self.depth if self.encoder == "lstm" else 0):
            for j, way in enumerate(("forward", "backward")):
                own = jax.random.split(jax.random.fold_in(keys[2], 2 * i + j))
                given, past = linear(own[0], 2 * h if i else d, 4 * h, h), linear(own[1], h, 4 * h)
                drawn[f"lstm_{i}_{way}"] = {"given": given, "past": past}
        return drawn

    def prompt(self, params: Any) -> Float[Array, "count d_model"]:
        """encoder(E)."""
        x = params["embedding"]
        for i in range(self.depth if self.encoder == "lstm" else 0):
            ahead, back = (params[f"lstm_{i}_{way}"] for way in ("forward", "backward"))
            x = jnp.concatenate([lstm(ahead, x), lstm(back, x[::-1])[::-1]], axis=-1)
        layers = [params[f"mlp_{i}"] for i in range(3 if self.encoder == "mlp" else 2)]
        for layer in layers[:-1]:
            x = jax.nn.relu(applied(layer, x))
        return applied(layers[-1], x)

    def folded(self, params: Any) -> tuple[Adapter, Any]:
        """The prompt itself."""
        own = {field.name: getattr(self, field.name) for field in fields(PromptTuning)}
        return PromptTuning(**own), {"prompt": self.prompt(params)}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        for name in ("hidden", "depth"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"


def linear(key: PRNGKeyArray, inputs: int, outputs: int, spread: int | None = None) -> Boxes:
    """A matrix and a bias, uniform in +-1/sqrt(spread), which is `inputs` where nothing is said."""
    keys, limit = jax.random.split(key), (spread or inputs) ** -0.5
    return {
        "kernel": boxed(jax.random.uniform(keys[0], (inputs, outputs), minval=-limit, maxval=limit), None, None),
        "bias": boxed(jax.random.uniform(keys[1], (outputs,), minval=-limit, maxval=limit), None),
    }


def applied(layer: Any, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
    """x W + b."""
    return x @ layer["kernel"] + layer["bias"]


def lstm(params: Any, x: Float[Array, "length inputs"]) -> Float[Array, "length hidden"]:
    """c = f c + i g, h = o tanh(c), from zeros. Hochreiter and Schmidhuber 1997; gates sigmoid, g tanh."""
    inputs = applied(params["given"], x)

    def step(carry: tuple[Array, Array], given: Array) -> tuple[tuple[Array, Array], Array]:
        hidden, cell = carry
        i, f, g, o = jnp.split(given + applied(params["past"], hidden), 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros(inputs.shape[1] // 4, inputs.dtype)
    return jax.lax.scan(step, (zeros, zeros), inputs)[1]
