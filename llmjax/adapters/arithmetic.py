"""Arithmetic of what training changed: sums of task vectors, TIES, DARE, and LoRAs side by side."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS
from llmjax.adapters.lora import LoRA
from llmjax.config import ConfigError
from llmjax.nn.model import Params, flat, unflat


def task_vector(tuned: PyTree, base: PyTree) -> PyTree:
    """What training changed: tuned - base, float32. Ilharco et al. 2022 (2212.04089)."""
    return jax.tree.map(lambda new, old: new.astype(jnp.float32) - old.astype(jnp.float32), tuned, base)


def weighted_sum(vectors: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """sum_i w_i v_i: weights (1, 1) join skills, (w, 1 - w) go from one to the other, (-w,) unlearns."""
    pairs = list(zip(weights, vectors, strict=True))
    return jax.tree.map(lambda *xs: sum(w * x for (w, _), x in zip(pairs, xs, strict=True)), *vectors)


def applied(base: PyTree, vector: PyTree, weight: float = 1.0) -> PyTree:
    """base + weight v, in the dtypes of the base."""
    return jax.tree.map(lambda x, v: (x.astype(jnp.float32) + weight * v).astype(x.dtype), base, vector)


def trimmed(vector: PyTree, density: float) -> PyTree:
    """Of each array the int(density size) entries that are largest, and zeros: the first step of TIES (2306.01708)."""

    def one(x: Float[Array, "..."]) -> Float[Array, "..."]:
        kept = jnp.argsort(-jnp.abs(x).reshape(-1), stable=True)[: int(density * x.size)]
        return jnp.where(jnp.zeros(x.size, bool).at[kept].set(True).reshape(x.shape), x, 0)

    return jax.tree.map(one, vector)


def dropped(vector: PyTree, density: float, key: PRNGKeyArray) -> PyTree:
    """Each entry with probability `density`, divided by it, else zero: DARE (Yu et al. 2023, 2311.03099)."""
    leaves, tree = jax.tree.flatten(vector)
    keys = jax.random.split(key, len(leaves))
    kept = [jax.random.bernoulli(k, density, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [jnp.where(k, x / density, 0) for k, x in zip(kept, leaves, strict=True)])


def elected(vectors: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """Entry by entry the mean of the w_i v_i whose sign is that of sum_i v_i, of zero counted as plus.

    The last two steps of TIES (Yadav et al. 2023, 2306.01708), electing and merging: a zero agrees with no sign.
    """

    def one(*xs: Float[Array, "..."]) -> Float[Array, "..."]:
        stack = jnp.stack(xs)
        sign = jnp.where(jnp.sum(stack, axis=0) >= 0, 1, -1)
        agrees = jnp.sign(stack) == sign
        scaled = stack * jnp.asarray(weights).reshape(-1, *(1,) * xs[0].ndim)
        return jnp.sum(jnp.where(agrees, scaled, 0), axis=0) / jnp.maximum(jnp.sum(agrees, axis=0), 1)

    if len(vectors) != len(weights):
        raise ValueError(f"{len(vectors)} vectors and {len(weights)} weights")
    return jax.tree.map(one, *vectors)


def ties(vectors: Sequence[PyTree], weights: Sequence[float], density: float) -> PyTree:
    """Trim, elect, merge: TIES of task vectors."""
    return elected([trimmed(vector, density) for vector in vectors], weights)


def dare(vectors: Sequence[PyTree], weights: Sequence[float], density: float, key: PRNGKeyArray) -> PyTree:
    """The weighted sum of vectors that are thinned out at random."""
    keys = jax.random.split(key, len(vectors))
    thin = [dropped(vector, density, k) for vector, k in zip(vectors, keys, strict=True)]
    return weighted_sum(thin, weights)


def concatenated(
    model: Adapted, params: Params, weights: Sequence[float], name: str = "default"
) -> tuple[Adapted, Params]:
    """One LoRA for those that are on: sum_i w_i s_i A_i B_i exactly, of the rank of all of them together.

    A sum of the A_i and of the B_i would be another matrix: (A1 + A2)(B1 + B2) is not A1 B1 + A2 B2. Raises ConfigError
    where the adapters are not LoRAs of the same targets, or their number is not that of the weights.
    """
    on = [adapter for adapter in model.on if type(adapter) is LoRA]
    if len(on) != len(model.on) or len({adapter.targets for adapter in on}) != 1 or len(on) != len(weights):
        raise ConfigError("adapters: put side by side are LoRAs of the same targets, one for each weight")
    rank = sum(adapter.rank for adapter in on)
    together = LoRA(name=name, targets=on[0].targets, rank=rank, alpha=float(rank))
    leaves = flat(params)
    result: dict[str, Any] = {path: x for path, x in leaves.items() if f"{ADAPTERS}/" not in path}
    for place, projection in on[0].found(model.base).items():
        a, b = ([leaves[f"{place}/{ADAPTERS}/{adapter.name}/{leaf}"] for adapter in on] for leaf in "ab")
        scaled = [w * adapter.scale * x for w, adapter, x in zip(weights, on, b, strict=True)]
        side = -1 - len(projection.outputs)
        result[f"{place}/{ADAPTERS}/{name}/a"] = jnp.concatenate(a, axis=-1)
        result[f"{place}/{ADAPTERS}/{name}/b"] = jnp.concatenate(scaled, axis=side)
    return replace(model, adapters=(together,), active=None), unflat(result)
