"""The definition of the linear recurrence: one token after the other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact


def refusal(chunk: int | None) -> str | None:
    """Only chunks: it has none."""
    return None if chunk is None else "has no chunk to configure"


def recurrence(
    a: Inexact[Array, "#batch #length *#channels"],
    b: Inexact[Array, "batch length *channels"],
    initial: Inexact[Array, "batch *channels"],
    reverse: bool,
    chunk: int | None,
) -> Inexact[Array, "batch length *channels"]:
    """All states h_t = a_t h_{t-1} + b_t."""

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        h = token[0] * h + token[1]
        return h, h

    by_time = tuple(jnp.swapaxes(x, 0, 1) for x in (jnp.broadcast_to(a, b.shape), b))
    return jnp.swapaxes(jax.lax.scan(step, initial, by_time, reverse=reverse)[1], 0, 1)
