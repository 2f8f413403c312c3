"""The short causal convolution that recurrent layers put before their recurrence."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.initializers import Initializer
from llmjax.nn.linear import parameter
from llmjax.nn.mixer import Context
from llmjax.nn.scans import causal_convolution


class ShortConvolution(nn.Module):
    """y_t = sum over w of kernel_w x_{t - taps + 1 + w} + bias, per channel, within a segment.

    Owns `kernel` `[taps, channels]`, uniform within 1 / sqrt(taps), and `bias` where there is one, zeros.
    """

    channels: int
    taps: int
    bias: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        context: Context,
        state: Float[Array, "batch before channels"] | None,
    ) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch before channels"] | None]:
        """The convolution; with a `state`, the last inputs, of what follows them, and the new state."""
        kernel = parameter(
            self, "kernel", symmetric_uniform(self.taps), (self.taps, self.channels), ("taps", "d_inner")
        )
        bias = None
        if self.bias:
            bias = parameter(self, "bias", jax.nn.initializers.zeros, (self.channels,), ("d_inner",))
        y, last = causal_convolution(x, kernel, bias, initial_state=state, segment_ids=context.segment_ids)
        return y, None if state is None else last.astype(state.dtype)


def symmetric_uniform(inputs: int) -> Initializer:
    """Initialiser: uniform within 1 / sqrt(inputs), what PyTorch gives convolutions and Mamba its steps."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        bound = 1 / math.sqrt(inputs)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
