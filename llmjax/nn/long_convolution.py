"""Causal convolution with a kernel as long as the sequence, by FFT."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def long_convolution(
    x: Float[Array, "batch length channels"],
    kernel: Float[Array, "length channels"],
    segment_ids: Int[Array, "batch length"] | None = None,
) -> Float[Array, "batch length channels"]:
    """y_t = sum over s <= t of kernel_{t-s} x_s, per channel, in float32; O(length log(length)).

    With `segment_ids` the sum runs over the token's own segment; tokens with a negative id are absent: they add nothing
    and their output is 0. Padding lies before or after a segment, not within. This costs O(length log(length)^2): at
    most one segment lies on both sides of the middle, so one FFT takes the tokens of its first part into its second,
    and then each half is done in the same way, all parts of one size together.
    """
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    if segment_ids is None:
        size = fft_size(2 * x.shape[1])
        return circular(x, kernel, size)[:, : x.shape[1]]
    batch, length, channels = x.shape
    runs = count_runs(segment_ids)
    size = 1 << max(length - 1, 0).bit_length()
    pad = size - length
    x = jnp.pad(jnp.where((runs >= 0)[..., None], x, 0), ((0, 0), (0, pad), (0, 0)))
    runs, kernel = jnp.pad(runs, ((0, 0), (0, pad)), constant_values=-1), jnp.pad(kernel, ((0, pad), (0, 0)))
    y, part = kernel[0] * x, 1
    while part < size:
        tokens = x.reshape(batch, -1, 2, part, channels)
        run = runs.reshape(batch, -1, 2, part)
        shared = run[:, :, 0, -1:]
        first = jnp.where((run[:, :, 0] == shared)[..., None], tokens[:, :, 0], 0)
        # Outputs of the second half do not wrap around in 2 part points.
        across = circular(first, kernel[: 2 * part], 2 * part)[..., part:, :]
        across = jnp.where((run[:, :, 1] == shared)[..., None], across, 0)
        y = y + jnp.stack([jnp.zeros_like(across), across], axis=2).reshape(y.shape)
        part *= 2
    return jnp.where((runs >= 0)[..., None], y, 0)[:, :length]


def fft_size(least: int) -> int:
    """The smallest power of two that is not below `least`."""
    return 1 << max(least - 1, 0).bit_length()


def circular(
    x: Float[Array, "... length channels"], kernel: Float[Array, "taps channels"], size: int
) -> Float[Array, "... size channels"]:
    """The circular convolution of `size` points over the last axis but one."""
    spectrum = jnp.fft.rfft(x, size, axis=-2) * jnp.fft.rfft(kernel, size, axis=0)
    return jnp.fft.irfft(spectrum, size, axis=-2)


def count_runs(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Which stretch of equal ids a token lies in, so that no two segments of a row share a number; -1 is absent."""
    new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(segment_ids < 0, -1, jnp.cumsum(new, axis=1, dtype=jnp.int32))
