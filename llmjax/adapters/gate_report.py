"""What gates say while they train: maps of them, how much each direction weighs, and what to do about the penalty."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.adapters.base import ADAPTERS
from llmjax.adapters.gated import GatedLoRA, opened
from llmjax.nn.model import Params, flat


def gate_map(adapter: GatedLoRA, params: Params) -> dict[str, Float[Array, "*stack rank"]]:
    """The gates of each projection, by its path; stacked over layers (and experts), as they are drawn in a heat map."""
    ends = f"/{ADAPTERS}/{adapter.name}/gate"
    found = {path.removesuffix(ends): x for path, x in flat(params).items() if path.endswith(ends)}
    return {path: opened(adapter.gate, x) for path, x in found.items()}


def gate_sum(gates: Float[Array, "*stack rank"]) -> Float[Array, "*stack"]:
    """sum g. No rank: see `importance`."""
    return jnp.sum(gates, axis=-1)


def importance(adapter: GatedLoRA, params: Params) -> dict[str, Float[Array, "*stack rank"]]:
    """|g_k| |a_k| |b_k| of each direction, by path: unlike g it is what the change is made of."""
    leaves = flat(params)

    def of(path: str, gates: Float[Array, "*stack rank"]) -> Float[Array, "*stack rank"]:
        a, b = (leaves[f"{path}/{ADAPTERS}/{adapter.name}/{leaf}"] for leaf in "ab")
        sizes = (
            jnp.sqrt(jnp.sum(jnp.square(a), axis=tuple(range(gates.ndim - 1, a.ndim - 1)))),
            jnp.sqrt(jnp.sum(jnp.square(b), axis=tuple(range(gates.ndim, b.ndim)))),
        )
        return jnp.abs(gates) * sizes[0] * sizes[1]

    return {path: of(path, gates) for path, gates in gate_map(adapter, params).items()}


def next_strength(gates: dict[str, Any], strength: float) -> tuple[float, str]:
    """The penalty's strength to go on with, and why.

    All gates closed: a tenth, at most 1e-4. Their mean above 0.8: five times as much. Else the same.
    """
    every = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(gates)])
    if bool(jnp.all(every <= 0.01)):
        return min(strength / 10, 1e-4), "every gate is closed: the penalty outweighs the loss"
    if float(jnp.mean(every)) > 0.8:
        return 5 * strength, "hardly a gate closes: the penalty is too weak"
    return strength, "some gates are closed and some open"
