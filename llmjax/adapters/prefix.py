"""Prefix tuning: learned keys and values before those of the tokens, in every layer. Li and Liang 2021 (2101.00190)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llmjax.adapters.base import Adapter, Boxes, begins, boxed
from llmjax.adapters.p_tuning import applied, linear
from llmjax.adapters.prompt import after
from llmjax.nn.model import Model, Params, flat, unflat


@dataclass(frozen=True)
class PrefixTuning(Adapter):
    """K' = [P_K; K], V' = [P_V; V] in every layer: the decode state that `count` tokens would have left behind.

    So it is what a cache holds (keys turned by their positions already), and a learned first state of recurrences. The
    tokens' positions follow after the prefix. With `hidden`, P = tanh(E A + a) B + b, of which P alone is kept after
    training (`folded`); without it is P-tuning v2 (Liu et al. 2022, 2110.07602). A row holds one document.
    """

    count: int = 20
    """length of the prefix"""
    hidden: int | None = None
    """width of the network that writes the prefix; None where the prefix itself is learned"""
    std: float = 1.0
    """standard deviation of the initial entries of P or E"""

    def finds(self, module: nn.Module, path: str, method: str) -> bool:
        """No module: it stands before the model's first token."""
        return False

    def draw_shared(self, key: PRNGKeyArray, model: Model) -> Boxes:
        """P `[count, features]` of all layers, or E and the network; states of recurrences, zero."""
        leaves, keys = leaves_of(model, self.count), jax.random.split(key, 3)
        first = {
            leaf.name: boxed(jnp.zeros(leaf.shape), *(None,) * len(leaf.shape)) for leaf in leaves if not leaf.long
        }
        long, drawn = [leaf for leaf in leaves if leaf.long], {"first": unflat(first)} if first else {}
        features = sum(leaf.features for leaf in long)
        if not long:
            return drawn
        if self.hidden is None:
            return drawn | {"prefix": boxed(self.std * jax.random.normal(keys[0], (self.count, features)), None, None)}
        width = long[0].features // long[0].shape[0]
        return drawn | {
            "embedding": boxed(self.std * jax.random.normal(keys[0], (self.count, width)), None, None),
            "into": linear(keys[1], width, self.hidden),
            "out": linear(keys[2], self.hidden, features),
        }

    def prefix(self, shared: Any) -> Float[Array, "count features"]:
        """P, of one layer after the other: of a layer its keys, then its values."""
        if self.hidden is None:
            return shared["prefix"]
        return applied(shared["out"], jnp.tanh(applied(shared["into"], shared["embedding"])))

    def enter(self, model: Model, inputs: dict[str, Any], shared: Any) -> dict[str, Any]:
        """The inputs after the prefix: a decode state that holds it where this is the first call."""
        later = after(inputs, self.count)
        return later | {"state": self.filled(model, inputs["state"], shared)} if begins(inputs) else later

    def filled(self, model: Model, state: dict[str, Any], shared: Any) -> dict[str, Any]:
        """A state of no tokens, the prefix in its next slots."""
        blocks, slot, leaves = flat(state["blocks"]), state["slot"], leaves_of(model, self.count)
        pieces = split_by_layer(self.prefix(shared), leaves) if any(leaf.long for leaf in leaves) else {}
        for name, piece in {**pieces, **flat(shared.get("first", {}))}.items():
            whole = blocks[name]
            piece = jnp.broadcast_to(piece[:, None], (len(whole), whole.shape[1], *piece.shape[1:]))
            start = (0, 0, slot if name in pieces else 0, *(0,) * (whole.ndim - 3))
            blocks[name] = jax.lax.dynamic_update_slice(whole, piece.astype(whole.dtype), start)
        batch = len(state["positions"])
        places = jnp.broadcast_to(slot + jnp.arange(self.count, dtype=jnp.int32), (batch, self.count))
        positions = jax.lax.dynamic_update_slice_in_dim(state["positions"], places, slot, axis=1)
        return {**state, "blocks": unflat(blocks), "positions": positions, "slot": slot + self.count}

    def slots(self) -> int:
        """One for each token that the prefix stands for."""
        return self.count

    def stateful(self) -> bool:
        """Always: the state is where it stands."""
        return True

    def folded(self, params: Any) -> tuple[Adapter, Any]:
        """The prefix itself."""
        if self.hidden is None:
            return self, params
        first = {"first": params["first"]} if "first" in params else {}
        return replace(self, hidden=None), {"prefix": self.prefix(params), **first}

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Models without a decode state of keys, values and recurrences, or that predict several tokens ahead."""
        yield from super().problems_in(model)
        try:
            leaves = leaves_of(model, max(self.count, 1))
        except (NotImplementedError, KeyError, ValueError) as error:
            yield (
                "count",
                f"needs a model that generates, with a decode state of keys, values and recurrences ({error})",
            )
            return
        if self.hidden is not None and not any(leaf.long for leaf in leaves):
            yield "hidden", "writes keys and values, which this model has none of: use None"
        if getattr(model, "multi_token", None) is not None:
            yield (
                "count",
                "fills a decode state, with which no tokens further ahead are predicted: set multi_token=None",
            )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.count < 1:
            yield "count", "must be at least 1"
        if self.hidden is not None and self.hidden < 1:
            yield "hidden", "must be at least 1, or None for no network"


class Leaf(NamedTuple):
    """One array of the decode state: its path among the blocks, and its shape without the batch.

    `long` ones hold something for each token, `shape` is then (repeats, count, ...); others are recurrences.
    """

    name: str
    shape: tuple[int, ...]
    long: bool

    @property
    def features(self) -> int:
        """Entries for each token, over all repeats."""
        return int(np.prod(self.shape)) // self.shape[1]


@lru_cache(maxsize=16)
def leaves_of(model: Model, count: int) -> tuple[Leaf, ...]:
    """The arrays of the decode state of `count` tokens, by the order of the pattern.

    Raises ValueError for states whose arrays are neither by token nor of a fixed size, or hold no floats.
    """
    here, more = (
        flat(jax.eval_shape(lambda n=n: model.init_state(1, n, "float32"))["blocks"]) for n in (count, count + 1)
    )
    found = []
    for name, x in sorted(here.items(), key=lambda item: (int(item[0].partition("/")[0]), item[0])):
        grown = tuple(size + (i == 2) for i, size in enumerate(x.shape))
        if not jnp.issubdtype(x.dtype, jnp.floating) or more[name].shape not in (x.shape, grown):
            raise ValueError(f"{name} of the state is neither")
        found.append(Leaf(name, (x.shape[0], *x.shape[2:]), more[name].shape == grown))
    return tuple(found)


def split_by_layer(prefix: Float[Array, "count features"], leaves: tuple[Leaf, ...]) -> dict[str, Float[Array, "..."]]:
    """The pieces `[repeats, count, ...]` of a prefix, by array of the decode state."""
    long = [leaf for leaf in leaves if leaf.long]
    repeats, count = long[0].shape[:2]
    ends = np.cumsum([leaf.features // repeats for leaf in long])
    each = jnp.split(prefix.reshape(count, repeats, -1), ends[:-1], axis=-1)
    return {leaf.name: jnp.moveaxis(x, 0, 1).reshape(leaf.shape) for leaf, x in zip(long, each, strict=True)}


def prefix_of(adapter: PrefixTuning, model: Model, params: Params, tokens: Int[Array, " count"]) -> dict[str, Any]:
    """The adapter's parameters that stand for `count` real tokens: what they leave in the model's decode state."""
    state = model.init_state(1, adapter.count, "float32")
    _, state = model.build().apply({"params": params}, tokens[None], state=state)
    blocks, leaves = flat(state["blocks"]), leaves_of(model, adapter.count)
    first = {leaf.name: blocks[leaf.name][:, 0] for leaf in leaves if not leaf.long}
    long = [blocks[leaf.name][:, 0] for leaf in leaves if leaf.long]
    flatter = [jnp.moveaxis(x, 0, 1).reshape(adapter.count, len(x), -1) for x in long]
    found = {"prefix": jnp.concatenate(flatter, axis=-1).reshape(adapter.count, -1)} if long else {}
    return found | ({"first": unflat(first)} if first else {})
