"""Scalars that layers hand out beside their activations: losses to be added to the objective's, and metrics.

They are Linen collections of float32 scalars, stacked over scanned layers, and exist only where a caller makes them
mutable: decoding computes none of them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOSSES = "losses"
METRICS = "metrics"


def hand_out(module: nn.Module, collection: str, name: str, value: Float[Array, ""]) -> None:
    """Put `value` into the collection (LOSSES or METRICS) under the module's path."""
    module.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def over_layers(
    reduce: Callable[[Float[Array, " layers"]], Float[Array, ""]], collected: Mapping[str, Any]
) -> dict[str, Float[Array, ""]]:
    """`reduce` (jnp.sum, jnp.mean) of the scalars of all layers, by name."""
    values = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(collected):
        values[path[-1].key].append(leaf.reshape(-1))
    return {name: reduce(jnp.concatenate(leaves)) for name, leaves in values.items()}
