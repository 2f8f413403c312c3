"""AdamW that also says which singular values of AdaLoRA are kept. Zhang et al. 2023 (2303.10512)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from llmjax.config import ConfigError
from llmjax.nn.model import flat, unflat
from llmjax.train.optimizers.adam import AdamW
from llmjax.train.optimizers.base import Setting, rate_problems
from llmjax.train.optimizers.paths import by_path

SINGULAR = r"(?:^|/)adapters/[^/]+/singular$"
"""Paths of AdaLoRA's singular values; `a` and `b` stand beside them."""


class RankBudgetState(NamedTuple):
    """What the method remembers."""

    inner: PyTree
    """AdamW's own."""
    done: Int[Array, ""]
    """Updates done."""
    sensitivity: PyTree
    """Running mean of |w dL/dw|, for every weight of the adapters."""
    uncertainty: PyTree
    """Running mean of how far |w dL/dw| is from that."""


@dataclass(frozen=True)
class RankBudgetAdamW(AdamW):
    """AdamW, after whose update all singular values but the b(t) most important of the whole model are set to zero.

    The importance of direction i is I(v_i) + mean_j I(P_ji) + mean_j I(Q_ij), I being sensitivity times uncertainty.
    The budget b falls from all directions, up to update `start`, as a cube to `rank` for each matrix at update `until`.
    In between, every `every` updates, the others are cut, and may grow again; afterwards they are cut always, and which
    are kept is fixed.
    """

    rank: float = 4.0
    """directions left for each matrix, on average"""
    start: int = 200
    """updates before the first cut"""
    until: int = 1000
    """update at which the budget has fallen"""
    every: int = 10
    """updates between cuts"""
    sensitivity: float = 0.85
    """decay rate of the running mean of sensitivities"""
    uncertainty: float = 0.85
    """decay rate of the running mean of uncertainties"""

    def settings(self, params: PyTree) -> dict[str, Setting]:
        """What the groups say; raises ConfigError where there is no AdaLoRA."""
        if not singular(by_path(params)):
            raise ConfigError("optimizer: RankBudgetAdamW cuts the singular values of AdaLoRA, and the model has none")
        return super().settings(params)

    def transform(
        self, learning_rate: float | Float[Array, ""], params: PyTree
    ) -> optax.GradientTransformationExtraArgs:
        """AdamW's, its state and updates completed."""
        inner = super().transform(learning_rate, params)

        def init(params: PyTree) -> RankBudgetState:
            zeros = unflat({path: jnp.zeros_like(x) for path, x in triplets(flat(params)).items()})
            return RankBudgetState(inner.init(params), jnp.zeros((), jnp.int32), zeros, zeros)

        def update(
            gradients: PyTree, state: RankBudgetState, params: PyTree | None = None, **extra: Any
        ) -> tuple[PyTree, RankBudgetState]:
            updates, own = inner.update(gradients, state.inner, params, **extra)
            count, weights, slopes = state.done + 1, flat(params), flat(gradients)
            means, doubts = flat(state.sensitivity), flat(state.uncertainty)
            learns = count < self.until
            for path in means:
                now = jnp.abs(weights[path] * slopes[path])
                mean = self.sensitivity * means[path] + (1 - self.sensitivity) * now
                doubt = self.uncertainty * doubts[path] + (1 - self.uncertainty) * jnp.abs(now - mean)
                means[path] = jnp.where(learns, mean, means[path])
                doubts[path] = jnp.where(learns, doubt, doubts[path])
            scores = importances({path: means[path] * doubts[path] for path in means})
            budget, cuts = self.budget(count, scores)
            kept, changes = largest(scores, budget), flat(updates)
            for path, mask in kept.items():
                changes[path] = jnp.where(cuts & ~mask, -weights[path], changes[path])
            return unflat(changes), RankBudgetState(own, count, unflat(means), unflat(doubts))

        return optax.GradientTransformationExtraArgs(init, update)

    def budget(self, count: Int[Array, ""], scores: dict[str, Float[Array, "..."]]) -> tuple[Array, Array]:
        """b at update `count`, and whether values are cut then."""
        full = sum(x.size for x in scores.values())
        left = int(self.rank * sum(x.size // x.shape[-1] for x in scores.values()))
        done = (count - self.start) / (self.until - self.start)
        cube = jnp.floor((full - left) * (1 - done) ** 3 + left).astype(jnp.int32)
        budget = jnp.where(count <= self.start, full, jnp.where(count > self.until, left, cube))
        return budget, (count > self.start) & ((count % self.every == 0) | (count > self.until))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        yield from rate_problems(self, "sensitivity", "uncertainty")
        if self.rank <= 0:
            yield "rank", "must be positive"
        if not 0 <= self.start < self.until:
            yield "until", f"must be after start, {self.start}"
        if self.every < 1:
            yield "every", "must be at least 1"


def singular(leaves: dict[str, Any]) -> list[str]:
    """Paths of the singular values."""
    return [path for path in leaves if re.search(SINGULAR, path)]


def triplets(leaves: dict[str, Any]) -> dict[str, Any]:
    """The singular values and the P and Q beside them."""
    places = [path.removesuffix("singular") for path in singular(leaves)]
    return {place + leaf: leaves[place + leaf] for place in places for leaf in ("a", "b", "singular")}


def importances(scores: dict[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
    """Of the directions, by the path of their singular values `[*stack, rank]`, from those of all weights."""
    result = {}
    for path in singular(scores):
        own, place = scores[path], path.removesuffix("singular")
        a, b = scores[f"{place}a"], scores[f"{place}b"]
        result[path] = (
            own
            + jnp.mean(a, axis=tuple(range(own.ndim - 1, a.ndim - 1)))
            + jnp.mean(b, axis=tuple(range(own.ndim, b.ndim)))
        )
    return result


def largest(scores: dict[str, Float[Array, "..."]], count: Int[Array, ""]) -> dict[str, Bool[Array, "..."]]:
    """Which are among the `count` largest of all; of equal ones the first."""
    every = jnp.concatenate([x.reshape(-1) for x in scores.values()])
    place = jnp.zeros(every.size, jnp.int32).at[jnp.argsort(-every, stable=True)].set(jnp.arange(every.size))
    masks, start = {}, 0
    for path, x in scores.items():
        masks[path] = (place[start : start + x.size] < count).reshape(x.shape)
        start += x.size
    return masks
