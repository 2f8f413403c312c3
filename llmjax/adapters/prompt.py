"""Prompt tuning: virtual tokens before the input, whose embeddings are learned. Lester et al. 2021 (2104.08691)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Adapter, Boxes, Call, begins, boxed, kernel_of
from llmjax.nn.model import Features, Model
from llmjax.nn.projections import projection_of, projections

TABLE = "embed"
"""Path of the table of token embeddings."""


@dataclass(frozen=True)
class PromptTuning(Adapter):
    """The input [P; E(tokens)], P `[count, d_model]`: rows of their own below the table of embeddings.

    Tokens and their positions follow after the virtual ones, of which nothing is predicted. A row holds one document.
    Of several prompts the last stands first, and its rows come before those of the others.
    """

    count: int = 20
    """virtual tokens"""
    initial: Literal["vocabulary", "normal"] = "vocabulary"
    """what P begins as: embeddings of `tokens`, or normal entries as spread as those of the table"""
    tokens: tuple[int, ...] = ()
    """token ids that P begins as, repeated to `count`; where empty, ones drawn from the vocabulary"""

    def finds(self, module: nn.Module, path: str, method: str) -> bool:
        """The table of token embeddings."""
        return method == "__call__" and path == TABLE and projection_of(module) is not None

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """P."""
        return {"prompt": boxed(self.begin(key, table_of(module)), None, "d_model")}

    def begin(self, key: PRNGKeyArray, table: Float[Array, "vocab d_model"]) -> Float[Array, "count d_model"]:
        """What P begins as."""
        if self.initial == "normal":
            return jax.random.normal(key, (self.count, table.shape[1])) * jnp.std(table)
        ids = jax.random.randint(key, (self.count,), 0, len(table))
        if self.tokens:
            ids = jnp.resize(jnp.array(self.tokens), (self.count,))
        return jnp.take(table, ids, axis=0).astype(jnp.float32)

    def prompt(self, params: Any) -> Float[Array, "count d_model"]:
        """P."""
        return params["prompt"]

    def around(self, call: Call) -> Float[Array, "rows d_model"]:
        """The table, P below it, and then the rows that other prompts have put there."""
        table, vocab = call.make(), table_of(call.module).shape[0]
        return jnp.concatenate([table[:vocab], self.prompt(call.params).astype(table.dtype), table[vocab:]])

    def enter(self, model: Model, inputs: dict[str, Any], shared: Any) -> dict[str, Any]:
        """The inputs with ids of P's rows in front, or in later calls of decoding with positions after them."""
        inputs = after(inputs, self.count)
        if not begins(inputs):
            return inputs
        vocab, tokens = vocab_of(model), inputs["tokens"]
        inputs = inputs | {"tokens": jnp.where(tokens < vocab, tokens, tokens + self.count)}
        virtual = jnp.arange(self.count, dtype=jnp.int32)
        here = {name: x for name, x in inputs.items() if x is not None}
        start = here["state"]["slot"] if "state" in here else 0
        front = {"tokens": vocab + virtual, "positions": start + virtual, "prefix": jnp.ones(self.count, bool)}
        if "segment_ids" in here:  # the row's document, or padding where it holds none
            front["segment_ids"] = jnp.max(here["segment_ids"], axis=1, keepdims=True)
        return inputs | {name: self.in_front(x, here[name]) for name, x in front.items() if name in here}

    def in_front(self, x: Array, of: Array) -> Array:
        """What stands for the virtual tokens, and `of` each row's own tokens after it."""
        return jnp.concatenate([jnp.broadcast_to(x, (len(of), self.count)).astype(of.dtype), of], axis=1)

    def leave(self, model: Model, features: Features, given: dict[str, Any]) -> Features:
        """The states of tokens alone, and a tied head without P."""
        vocab = vocab_of(model)
        features = replace(features, kernel=features.kernel[:, :vocab])
        if not begins(given):
            return features
        ahead = None if features.ahead is None else features.ahead[:, :, self.count :]
        return replace(features, hidden=features.hidden[:, self.count :], ahead=ahead)

    def slots(self) -> int:
        """One for each virtual token."""
        return self.count

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Models that virtual tokens cannot stand in front of, and token ids that they lack."""
        yield from super().problems_in(model)
        table = projections(model).get(TABLE)
        if table is None or not model.generates():
            yield "count", "adds virtual tokens, which go before the text of a model that generates: use a Decoder"
        elif any(not 0 <= token < table.inputs[0] for token in self.tokens):
            yield "tokens", f"holds ids outside 0 to {table.inputs[0] - 1}, the model's vocabulary"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.count < 1:
            yield "count", "must be at least 1"
        if self.tokens and self.initial != "vocabulary":
            yield "tokens", "are what P begins as: set initial=vocabulary, or leave them out"


def table_of(module: nn.Module) -> Float[Array, "vocab d_model"]:
    """The table of embeddings that a module owns."""
    projection = projection_of(module)
    assert projection is not None
    return kernel_of(module, projection)


def vocab_of(model: Any) -> int:
    """Rows of the model's own table."""
    return int(model.vocab)


def after(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """The inputs with given positions moved on by `count`; padding keeps -1."""
    positions = inputs.get("positions")
    if positions is None:
        return inputs
    return inputs | {"positions": jnp.where(positions < 0, -1, positions + count)}
