"""AdamW for gated LoRA: gates learn at their own rate, under a penalty that sets in slowly."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from llmjax.adapters.gated import Gate, Penalty, opened, penalty
from llmjax.config import ConfigError
from llmjax.nn.model import flat, unflat
from llmjax.train.optimizers.adam import AdamW
from llmjax.train.optimizers.base import Setting
from llmjax.train.optimizers.paths import by_path

GATES = r"(?:^|/)adapters/[^/]+/gate$"
"""Paths of the gates; `a` and `b` stand beside them."""


class GatedState(NamedTuple):
    """What the method remembers."""

    inner: PyTree
    """AdamW's own."""
    done: Int[Array, ""]
    """Updates done."""


@dataclass(frozen=True)
class GatedAdamW(AdamW):
    """AdamW on loss + l(t) penalty(gates) + m sum (|A|^2 + |B|^2), l(t) = strength min(1, t / warmup).

    At the start B is zero and no gate has a gradient from the loss: hence the warm-up. The penalty on A and B is in the
    loss, so that no gate closes only for B to grow; together they are one on the roots of the product (Hoff 2016,
    1611.00040). Gates have no weight decay; projected ones are clipped to [0, 1] after each update.
    """

    gate: Gate = "projected"
    """how the adapters hold their gates"""
    penalty: Penalty = "l1"
    """what is asked of them"""
    strength: float = 3e-2
    """l: weight of the penalty"""
    warmup: int = 100
    """updates in which l grows to its value"""
    factors: float = 1e-3
    """m: weight of the squares of A and B"""
    gate_rate: float = 10.0
    """multiple of the learning rate for gates"""

    def settings(self, params: PyTree) -> dict[str, Setting]:
        """What the groups say, but for gates; raises ConfigError where there are none."""
        found = super().settings(params)
        gates = {path for path in found if re.search(GATES, path)}
        if not gates:
            raise ConfigError("optimizer: GatedAdamW closes the gates of GatedLoRA, and the model has none")
        return {
            path: Setting(s.multiplier * self.gate_rate, 0.0, s.frozen) if path in gates else s
            for path, s in found.items()
        }

    def transform(
        self, learning_rate: float | Float[Array, ""], params: PyTree
    ) -> optax.GradientTransformationExtraArgs:
        """AdamW's, with the penalty's gradient before it and the projection after it."""
        inner, gates = super().transform(learning_rate, params), [p for p in by_path(params) if re.search(GATES, p)]

        def cost(leaves: dict[str, Array], strength: Float[Array, ""]) -> Float[Array, ""]:
            places = [path.removesuffix("gate") for path in gates]
            open_gates = sum(penalty(self.penalty, opened(self.gate, leaves[path])) for path in gates)
            squares = sum(jnp.sum(jnp.square(leaves[place + leaf])) for place in places for leaf in "ab")
            return strength * open_gates + self.factors * squares

        def update(
            gradients: PyTree, state: GatedState, params: PyTree | None = None, **extra: Any
        ) -> tuple[PyTree, GatedState]:
            leaves = flat(params)
            strength = self.strength * jnp.minimum(1.0, state.done / self.warmup)
            added = jax.grad(cost)(leaves, strength)
            total = unflat({path: x + added[path] for path, x in flat(gradients).items()})
            updates, own = inner.update(total, state.inner, params, **extra)
            changes = flat(updates)
            if self.gate == "projected":
                for path in gates:
                    changes[path] = jnp.clip(leaves[path] + changes[path], 0, 1) - leaves[path]
            return unflat(changes), GatedState(own, state.done + 1)

        return optax.GradientTransformationExtraArgs(
            lambda params: GatedState(inner.init(params), jnp.zeros((), jnp.int32)), update
        )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        for field in ("strength", "factors", "gate_rate"):
            if getattr(self, field) < 0:
                yield field, "is negative: use 0 for none"
        if self.warmup < 1:
            yield "warmup", "must be at least 1"
