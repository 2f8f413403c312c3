"""The selective scan in plain XLA: the states of one chunk of tokens at a time, and again in the backward pass.

What the backward pass keeps are the inputs and the state before each chunk; discretisation, states, readout and gate of
a chunk are computed again from them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear_recurrence.xla import recurrence
from pallas_kernels.segments import Marks
from pallas_kernels.selective_scan.inputs import Tokens, Weights, finished, prepared

CHUNK = 64
"""Tokens whose states exist at a time; on a CPU chunks of 128 and 256 were slower."""
PART = 16
"""Tokens of a chunk that are taken one after the other; the parts of a chunk go side by side."""


def refusal(tokens: Tokens, weights: Weights) -> str | None:
    """Nothing."""
    return None


def scan(
    tokens: Tokens, weights: Weights, initial: Float[Array, "batch width state"], reverse: bool, dt_softplus: bool
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width state"]]:
    """y and the last state."""
    batch, length, width = tokens.x.shape
    groups, state = tokens.B.shape[2:]
    chunk = min(CHUNK, length)

    def one(h: Array, tokens: Tokens) -> tuple[Array, Array]:
        return scan_chunk(h, tokens, weights, reverse, dt_softplus)

    def cut(values: Array) -> Array:
        widths = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (values.ndim - 2)
        return jnp.swapaxes(jnp.pad(values, widths).reshape(batch, -1, chunk, *values.shape[2:]), 0, 1)

    if length % chunk and tokens.marks is None:
        # Padding is absent tokens: a step of zero would not stay zero under the softplus.
        here = jnp.ones((batch, length), bool)
        tokens = tokens._replace(marks=Marks(here, ~here))
    by_channel = jnp.swapaxes(initial.reshape(batch, groups, width // groups, state), 2, 3)
    body = jax.checkpoint(one, prevent_cse=False)
    final, y = jax.lax.scan(body, by_channel, jax.tree.map(cut, tokens), reverse=reverse)
    final = jnp.swapaxes(final, 2, 3).reshape(batch, width, state)
    return jnp.swapaxes(y, 0, 1).reshape(batch, -1, width)[:, :length], final


def scan_chunk(
    h: Float[Array, "batch groups state channels"], tokens: Tokens, weights: Weights, reverse: bool, dt_softplus: bool
) -> tuple[Float[Array, "batch groups state channels"], Float[Array, "batch chunk width"]]:
    """The state after a chunk and y of its tokens.

    Products are written as einsum so that the sums over channels, states and tokens in their gradients are dot
    products: XLA's reductions of a batch of one are many times slower on a CPU. Channels come last, as vectors want.
    """
    dtype = tokens.x.dtype
    tokens = prepared(tokens, weights.dt_bias, dt_softplus)
    batch, chunk, width = tokens.x.shape
    groups, state = tokens.B.shape[2:]
    A = jnp.swapaxes(weights.A.astype(h.dtype).reshape(groups, width // groups, state), 1, 2)
    dt, dx = (v.reshape(batch, chunk, groups, width // groups) for v in (tokens.dt, tokens.dt * tokens.x))
    decay = jnp.exp(jnp.einsum("btgc,gnc->btgnc", dt, A))
    if tokens.marks is not None:
        decay = jnp.where(tokens.marks.reset[:, :, None, None, None], 0, decay)
    states = recurrence(decay, jnp.einsum("btgc,btgn->btgnc", dx, tokens.B), h, reverse, PART)
    readout = jnp.einsum("btgnc,btgn->btgc", states, tokens.C).reshape(batch, chunk, width)
    return states[:, 0 if reverse else -1], finished(readout, tokens, weights.D).astype(dtype)
