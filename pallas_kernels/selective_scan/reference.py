"""The definition of the selective scan: one token after the other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.selective_scan.inputs import Tokens, Weights, finished, prepared


def refusal(tokens: Tokens, weights: Weights) -> str | None:
    """Nothing."""
    return None


def scan(
    tokens: Tokens, weights: Weights, initial: Float[Array, "batch width state"], reverse: bool, dt_softplus: bool
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width state"]]:
    """y and the last state."""
    tokens = prepared(tokens, weights.dt_bias, dt_softplus)
    A = weights.A.astype(initial.dtype)

    def step(h: Array, token: Tokens) -> tuple[Array, Array]:
        x, dt, B, C, _, marks = token
        B, C = (jnp.repeat(group, x.shape[1] // group.shape[1], axis=1) for group in (B, C))
        decay = jnp.exp(dt[..., None] * A)
        if marks is not None:
            decay = jnp.where(marks.reset[:, None, None], 0, decay)
        h = decay * h + (dt * x)[..., None] * B
        return h, jnp.sum(C * h, axis=-1)

    by_time = jax.tree.map(lambda values: jnp.swapaxes(values, 0, 1), tokens)
    final, readout = jax.lax.scan(step, initial, by_time, reverse=reverse)
    return finished(jnp.swapaxes(readout, 0, 1), tokens, weights.D), final
