"""Fake quantisation: what is computed is rounded, what is learned is not (training against rounding).

    forward Q(w),   backward dQ/dw := 1   (straight through; Bengio et al. 2013, 1308.3432)

With a step of its own, clipped at -n and p: Q(w) = s clip(round(w / s), -n, p), and dQ/dw := 1 inside the range, 0
where w is clipped. Learned step size (LSQ; Esser et al. 2019, 1902.08153) also gives the step a gradient,

    dQ/ds := round(w / s) - w / s inside, -n or p outside,   times 1 / sqrt(N p) over the N numbers that share s
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmjax.quant.formats import Format, rounded


def fake_quantise(w: Float[Array, "*stack outputs inputs"], form: Format) -> Float[Array, "*stack outputs inputs"]:
    """Q(w) of transposed matrices (or of activations, a token an output), straight through; nothing is clipped."""
    nearest = rounded(jax.lax.stop_gradient(w), form).astype(w.dtype)
    return w + (nearest - jax.lax.stop_gradient(w))


def clipped(
    x: Float[Array, "..."], step: Float[Array, "..."] | float, zero: float = 0.0, limits: tuple[int, int] = (-8, 7)
) -> Float[Array, "..."]:
    """(clip(round(x / step) + zero) - zero) step with a step that is given: gradient 1 inside, 0 where clipped."""
    low, high = limits
    q = jnp.round(x / step) + zero
    value = jax.lax.stop_gradient((jnp.clip(q, low, high) - zero) * step)
    inside = jax.lax.stop_gradient((q >= low) & (q <= high))
    passed = jnp.where(inside, x, 0.0)
    return passed + (value - jax.lax.stop_gradient(passed))


def learned_step(
    x: Float[Array, "..."], step: Float[Array, "..."], limits: tuple[int, int] = (-8, 7)
) -> Float[Array, "..."]:
    """Q(x) with gradients to x and to the positive `step`, which broadcasts against x."""
    low, high = limits
    shared = x.size / max(1, np.size(step))
    factor = 1 / np.sqrt(shared * high)
    step = step * factor + jax.lax.stop_gradient(step * (1 - factor))
    q = jnp.clip(x / step, low, high)
    return (q + jax.lax.stop_gradient(jnp.round(q) - q)) * step


def initial_step(x: Float[Array, "..."], limits: tuple[int, int] = (-8, 7)) -> Float[Array, ""]:
    """The paper's first step, 2 mean|x| / sqrt(p)."""
    return 2 * jnp.mean(jnp.abs(x)) / np.sqrt(limits[1])


def noise_penalty(w: Float[Array, "*stack outputs inputs"], form: Format, mean: bool = False) -> Float[Array, ""]:
    """sum (or mean) of (w - Q(w))^2 with Q(w) held constant, so that its gradient is 2 (w - Q(w)) (over the count)."""
    apart = jnp.square(w - jax.lax.stop_gradient(rounded(w, form)))
    return jnp.mean(apart) if mean else jnp.sum(apart)
