"""Adapters folded into the matrices that they change, and taken out again."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS, ProjectionAdapter
from llmjax.adapters.dora import DoRA
from llmjax.config import ConfigError
from llmjax.nn.model import Params, flat, unflat
from llmjax.nn.projections import Projection
from llmjax.nn.stored import Stored

Changes = dict[str, Float[Array, "..."]]
"""What was added, float32, by the path of what it was added to: `blocks/0/mixer/query/kernel`."""


def merge(model: Adapted, params: Params, *, dequantise: bool = False) -> tuple[Params, Changes]:
    """Parameters of the base alone that compute what `model` does with its adapters on, and what was added to them.

    Adapters fold in their order, in float32; the sums are kept in the base's dtypes. Raises ConfigError for adapters
    that change no matrix, for DoRA after another one, and for quantised matrices unless they may be dequantised.
    """
    leaves, here = flat(params), flat(model.base.abstract())
    base = {path: x for path, x in leaves.items() if path in here}
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for adapter, place, projection in list(folds(model)):  # what does not fold is found before anything is computed
        own, shared = (under(leaves, f"{at}{ADAPTERS}/{adapter.name}/") for at in (f"{place}/", ""))
        steps: dict[str, tuple[Callable[..., Any], Any]] = {projection.leaf: (adapter.weight, projection.axes)}
        if projection.bias and type(adapter).bias is not ProjectionAdapter.bias:
            steps["bias"] = (adapter.bias, projection.output_axes)
        for leaf, (step, axes) in steps.items():
            path = f"{place}/{leaf}"
            if path not in before:
                before[path] = after[path] = dense(path, base[path], dequantise)
            after[path] = over_stack(step, after[path].ndim - len(axes), projection, shared)(own, after[path])
    changes = {path: after[path] - x for path, x in before.items()}
    return unflat(base | {path: x.astype(base[path].dtype) for path, x in after.items()}), changes


def unmerge(params: Params, changes: Changes) -> Params:
    """The base's parameters again: those that `merge` returned less what it added, to one rounding of the sum."""
    leaves = flat(params)
    rest = {path: (leaves[path].astype(jnp.float32) - x).astype(leaves[path].dtype) for path, x in changes.items()}
    return unflat(leaves | rest)


def folds(model: Adapted) -> Iterator[tuple[ProjectionAdapter, str, Projection]]:
    """Each adapter that is on with each projection that it changes; raises ConfigError for what does not fold."""
    changed: set[str] = set()
    for adapter in model.on:
        what = f"adapters: {type(adapter).__name__} {adapter.name!r}"
        if not isinstance(adapter, ProjectionAdapter):
            raise ConfigError(f"{what} changes activations, no matrix that it could be folded into: merge the others")
        found = adapter.found(model.base)
        if isinstance(adapter, DoRA) and (both := changed & set(found)):
            raise ConfigError(f"{what} rescales what adapters before it add to {min(both)}: put it first")
        changed |= set(found)
        yield from ((adapter, place, projection) for place, projection in found.items())


def under(leaves: dict[str, Any], place: str) -> dict[str, Any]:
    """The leaves below a place, by the rest of their path."""
    return {path.removeprefix(place): x for path, x in leaves.items() if path.startswith(place)}


def dense(path: str, x: Any, dequantise: bool) -> Float[Array, "..."]:
    """A parameter as a float32 array; raises ConfigError where it is quantised and must stay so."""
    if not isinstance(x, Stored):
        return jnp.asarray(x, jnp.float32)
    if not dequantise:
        raise ConfigError(
            f"{path} is quantised, and rounding the sum would lose the small change: merge with dequantise=True, "
            "which keeps it as an array, or leave the adapter in the model"
        )
    return x.astype(jnp.float32).dense()


def over_stack(
    step: Callable[..., Float[Array, "..."]], axes: int, projection: Projection, shared: Any
) -> Callable[[Any, Any], Float[Array, "..."]]:
    """`step(params, matrix)` over so many axes of layers and experts in front."""

    def over(params: Any, x: Any) -> Float[Array, "..."]:
        return step(params, x, projection, shared)

    for _ in range(axes):
        over = jax.vmap(over)
    return over
