"""Values outside of a method's domain, found while the program runs, in jax's debug mode alone (JAX_DEBUG_NANS=1)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CONFIG: Any = jax.config
"""Its attributes are made at run time."""


def check_range(name: str, values: Float[Array, "..."], low: float = -math.inf, high: float = math.inf) -> None:
    """Have the traced program end with an error that names the argument where a value is not in [low, high], or NaN.

    Adds nothing to the program unless `jax_debug_nans` is on when it is traced: a callback to the host costs more than
    a kernel. The error is a ValueError, wrapped by jax where the program was compiled.
    """
    if CONFIG.jax_debug_nans and values.size:
        jax.debug.callback(functools.partial(refuse, name, low, high), jnp.min(values), jnp.max(values))


def refuse(name: str, low: float, high: float, smallest: Float[Array, ""], largest: Float[Array, ""]) -> None:
    """Raise ValueError unless both extremes lie in [low, high]."""
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{name} holds values from {smallest} to {largest}: they must lie between {low} and {high}")
