"""CLSE: image tokens ranked by how much the fine detail around them has changed since the first layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from llmjax.nn.token_reduction import Seen, visual_attention

TEMPERATURE = 0.1
"""Of the sigmoid of the standardised change (public code of the method)."""


def clse(rows: int, columns: int) -> Callable[[Seen], Float[Array, "batch length"]]:
    """The score of images of `rows` x `columns` tokens, all of them still there: attention * weight. 2606.24165.

    weight = sigmoid(z / 0.1), z the standardised `evolution` of `detail` from the stream before the first layer to the
    one after this layer; attention is the last token's. The paper's later stages, whose grid has holes, rank by
    attention alone: `last_attention`. It removes tokens after layers 1, 11 and 21 of a LLaVA, 576 -> 330 -> 210 -> 62.
    """

    def score(seen: Seen) -> Float[Array, "batch length"]:
        grids = (grid_of(x, seen, rows, columns) for x in (seen.first, seen.hidden))
        change = evolution(*(detail(grid).reshape(len(grid), -1) for grid in grids))
        spread = jnp.std(change, axis=1, keepdims=True)
        weight = jax.nn.sigmoid((change - jnp.mean(change, axis=1, keepdims=True)) / (spread + 1e-6) / TEMPERATURE)
        index = jnp.clip(jnp.cumsum(seen.image, axis=1) - 1, 0)
        return last_attention(seen) * jnp.take_along_axis(weight, index, axis=1)

    return score


def last_attention(seen: Seen) -> Float[Array, "batch length"]:
    """The attention of the row's last token to each image token."""
    return visual_attention(seen, jnp.full(len(seen.image), seen.image.shape[1] - 1))


def grid_of(
    x: Float[Array, "batch length d_model"], seen: Seen, rows: int, columns: int
) -> Float[Array, "batch rows columns d_model"]:
    """The image tokens' vectors, in their order, as a grid."""
    index = jnp.argsort(~seen.image, axis=1)[:, : rows * columns]
    return jnp.take_along_axis(x, index[..., None], axis=1).reshape(len(x), rows, columns, -1)


def evolution(first: Float[Array, "batch tokens"], now: Float[Array, "batch tokens"]) -> Float[Array, "batch tokens"]:
    """min(1, |now - first| / (mean(first) + first + 1e-6)), the mean over a row's tokens."""
    return jnp.minimum(1.0, jnp.abs(now - first) / (jnp.mean(first, axis=1, keepdims=True) + first + 1e-6))


def detail(grid: Float[Array, "batch rows columns channels"]) -> Float[Array, "batch rows columns"]:
    """Mean over channels of |high-pass(grid)|: 0 where the field is constant. Float32.

    The filter is 1 - exp(-d^2 / (2 s^2)) of the distance d to the zero frequency, s = min(rows, columns) / 20.
    """
    rows, columns = grid.shape[1:3]
    u, v = jnp.fft.fftfreq(rows, 1 / rows), jnp.fft.fftfreq(columns, 1 / columns)
    width = 0.1 * min(rows, columns) / 2
    keep = 1 - jnp.exp(-(u[:, None] ** 2 + v**2) / (2 * width**2))
    spectrum: Complex[Array, "..."] = jnp.fft.fft2(grid.astype(jnp.float32), axes=(1, 2))
    return jnp.mean(jnp.abs(jnp.fft.ifft2(spectrum * keep[..., None], axes=(1, 2))), axis=-1)
