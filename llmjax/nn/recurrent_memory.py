"""Recurrent memory: a few vectors carried from segment to segment of a long sequence, through any stack of blocks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Stack = Callable[[Float[Array, "batch inner d_model"]], Float[Array, "batch inner d_model"]]
"""Blocks that run on whole sequences, `inner` tokens each."""


def recurrent_memory(
    run: Stack,
    x: Float[Array, "batch length d_model"],
    memory: Float[Array, "batch memory d_model"],
    segment: int,
    unroll: int | None = None,
) -> tuple[Float[Array, "batch length d_model"], Float[Array, "batch memory d_model"]]:
    """[_, y_s, m_s] = run([m_{s-1}, x_s, m_{s-1}]) for each segment x_s of `segment` tokens; returns y and the last m.

    The memory before the tokens is what causal blocks read, that after them is where they write. Gradients go through
    the memory inside windows of `unroll` segments (None: all). A memory of no vectors is the stack segment by segment.
    Bulatov et al. 2022 (2207.06881, section 3.2). Raises ValueError where segments do not divide the length.
    """
    batch, length, d_model = x.shape
    if segment < 1 or length % segment:
        raise ValueError(f"length {length} is not a multiple of segment={segment}")
    if unroll is not None and unroll < 1:
        raise ValueError(f"unroll={unroll} must be at least 1, or None for all segments")
    slots, count = memory.shape[1], length // segment

    def step(
        memory: Float[Array, "batch memory d_model"], part: tuple[Int[Array, ""], Float[Array, "batch segment d_model"]]
    ) -> tuple[Float[Array, "batch memory d_model"], Float[Array, "batch segment d_model"]]:
        index, tokens = part
        if unroll is not None:
            memory = jnp.where((index % unroll == 0) & (index > 0), jax.lax.stop_gradient(memory), memory)
        y = run(jnp.concatenate([memory, tokens, memory], axis=1))
        return y[:, slots + segment :], y[:, slots : slots + segment]

    parts = jnp.swapaxes(x.reshape(batch, count, segment, d_model), 0, 1)
    memory, y = jax.lax.scan(step, memory, (jnp.arange(count), parts))
    return jnp.swapaxes(y, 0, 1).reshape(batch, length, d_model), memory
