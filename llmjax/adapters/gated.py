"""Gated LoRA: a gate in [0, 1] on each direction of the change, which a penalty closes. After SoRA, 2311.11696."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import ADAPTERS, Boxes, boxed
from llmjax.adapters.diagonal import Diagonal
from llmjax.nn.model import Params, flat, unflat
from llmjax.nn.projections import Projection

Gate = Literal["projected", "sigmoid", "clamped", "hard_sigmoid"]
"""How a gate is held: as itself and clipped by the optimizer after each step, or as a number z, the gate being
sigmoid(z), clip(z, 0, 1) or clip(0.2 z + 0.5, 0, 1). Beyond their ranges the last two have no gradient: a gate that
falls there is closed (or open) for ever."""


@dataclass(frozen=True)
class GatedLoRA(Diagonal):
    """W' = W + s A diag(g) B with gates g in [0, 1] `[rank]`.

    `llmjax.train.optimizers.GatedAdamW` penalises open gates, `pruned` drops closed ones. The sum of the gates is no
    rank: g -> c g with b -> b / c changes nothing, so A and B need a penalty too.
    """

    gate: Gate = "projected"
    """how gates are held"""
    opening: float = 0.5
    """what they start at"""

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """LoRA's A and B, and the gates as they are held."""
        held = {
            "projected": self.opening,
            "clamped": self.opening,
            "sigmoid": math.log(self.opening / (1 - self.opening)) if 0 < self.opening < 1 else 0.0,
            "hard_sigmoid": (self.opening - 0.5) / 0.2,
        }
        return super().start(key, projection, kernel) | {"gate": boxed(jnp.full(self.rank, held[self.gate]), "rank")}

    def factors(self, params: Any) -> Float[Array, " rank"]:
        """The gates."""
        return opened(self.gate, params["gate"])

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if not 0 <= self.opening <= 1 or (self.gate == "sigmoid" and self.opening in (0, 1)):
            yield "opening", "must be from 0 to 1; a sigmoid reaches neither"


def opened(gate: Gate, held: Float[Array, "..."]) -> Float[Array, "..."]:
    """The gates of the numbers that they are held as."""
    if gate == "sigmoid":
        return jax.nn.sigmoid(held)
    if gate == "clamped":
        return jnp.clip(held, 0, 1)
    if gate == "hard_sigmoid":
        return jnp.clip(0.2 * held + 0.5, 0, 1)
    return held


Penalty = Literal["l1", "l0", "entropy"]
"""sum |g|; sum sigmoid((g - 0.5) / 0.1), a smooth count of open gates (another one: Louizos et al. 2017, 1712.01312);
- sum g log g + (1 - g) log(1 - g), which draws gates to 0 or 1, whichever is nearer."""


def penalty(kind: Penalty, gates: Float[Array, "..."]) -> Float[Array, ""]:
    """The penalty on open gates."""
    if kind == "l1":
        return jnp.sum(jnp.abs(gates))
    if kind == "l0":
        return jnp.sum(jax.nn.sigmoid((gates - 0.5) / 0.1))
    inside = jnp.clip(gates, 1e-6, 1 - 1e-6)
    return -jnp.sum(inside * jnp.log(inside) + (1 - inside) * jnp.log1p(-inside))


def pruned(adapter: GatedLoRA, params: Params, threshold: float = 0.01) -> tuple[GatedLoRA, Params]:
    """The adapter and a model's parameters without directions whose gate is at most `threshold`.

    Columns of A and rows of B are gathered, so that what is left costs less. All matrices keep as many as the one that
    has most open, those with the largest gates. Where only closed gates go (`threshold` 0) the output is the same.
    """
    leaves = flat(params)
    ends = f"/{ADAPTERS}/{adapter.name}/gate"
    gates = {path.removesuffix("gate"): opened(adapter.gate, x) for path, x in leaves.items() if path.endswith(ends)}
    rank = max(1, *(int(jnp.max(jnp.sum(g > threshold, axis=-1))) for g in gates.values()))
    for place, g in gates.items():
        kept = np.sort(np.argsort(-np.asarray(g), axis=-1, kind="stable")[..., :rank], axis=-1)
        lead = g.ndim - 1
        for name in ("gate", "a", "b"):
            x = leaves[place + name]
            axis = x.ndim - 1 if name == "a" else lead
            spread = kept.reshape(*kept.shape[:lead], *(rank if i == axis else 1 for i in range(lead, x.ndim)))
            leaves[place + name] = jnp.take_along_axis(x, spread, axis=axis)
    ratio = replace(adapter, rank=rank).scale / adapter.scale
    return replace(adapter, rank=rank, alpha=adapter.alpha / ratio), unflat(leaves)
