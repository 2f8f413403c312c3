"""Which keys a query may attend to, as a description that every implementation can evaluate block by block."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class Rule:
    """The static part of a mask: order and reach along the positions."""

    causal: bool
    window: tuple[int | None, int | None] | None


class Ends(NamedTuple):
    """The dynamic part of one side (queries or keys): position (negative: absent) and document of every token."""

    positions: Int[Array, "batch length"]
    segments: Int[Array, "batch length"] | None


def allowed(rule: Rule, query: Ends, key: Ends) -> Bool[Array, "batch query_length key_length"]:
    """True where the query may see the key: present, same document, and within the rule's order and reach."""
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    seen = (key.positions >= 0)[:, None, :] & (query.positions >= 0)[:, :, None]
    if rule.causal:
        seen &= distance >= 0
    left, right = rule.window or (None, None)
    if left is not None:
        seen &= distance <= left
    if right is not None:
        seen &= distance >= -right
    if query.segments is not None and key.segments is not None:
        seen &= query.segments[:, :, None] == key.segments[:, None, :]
    return jnp.broadcast_to(seen, jnp.broadcast_shapes(seen.shape, distance.shape))
