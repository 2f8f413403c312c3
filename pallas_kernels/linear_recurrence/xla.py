"""The linear recurrence in plain XLA: chunks side by side, and a gradient that keeps only the states.

Depth is 2 chunk + length / chunk steps, those inside chunks over all of them at once. No intermediate but an `a` that
is broadcast is as large as b: the composed maps of prefixes, which `associative_scan` holds at every level, exist here
for whole chunks only. On a CPU the forward pass took 0.3 to 0.9 of the time of `associative_scan` over all tokens, and
less of that inside of chunks. The product of a over a chunk must not overflow: with |a| > 1 take shorter chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

CHUNK = 64
"""Tokens of a chunk; from 16 to 256 the times on a CPU were the same within the noise of the clock."""


def refusal(chunk: int | None) -> str | None:
    """Nothing."""
    return None


def recurrence(
    a: Inexact[Array, "#batch #length *#channels"],
    b: Inexact[Array, "batch length *channels"],
    initial: Inexact[Array, "batch *channels"],
    reverse: bool,
    chunk: int | None,
) -> Inexact[Array, "batch length *channels"]:
    """All states h_t = a_t h_{t-1} + b_t."""
    return differentiable(a, b, initial, reverse, chunk or CHUNK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def differentiable(a: Array, b: Array, initial: Array, reverse: bool, chunk: int) -> Array:
    """`chunked` with the gradient of the module's words."""
    return chunked(a, b, initial, reverse, chunk)


def save(a: Array, b: Array, initial: Array, reverse: bool, chunk: int) -> tuple[Array, tuple[Array, Array, Array]]:
    """The states, and what the backward pass needs."""
    states = chunked(a, b, initial, reverse, chunk)
    return states, (a, states, initial)


def gradients(
    reverse: bool, chunk: int, saved: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, Array]:
    """The same recurrence the other way: g_t = cotangent_t + a_{t+1} g_{t+1}, then db = g, da_t = g_t h_{t-1}.

    Without a conjugate for complex a: cotangents in jax are transposed, not adjoint.
    """
    a, states, initial = saved
    # What rolls around meets the zero state.
    later = jnp.roll(a, 1 if reverse else -1, axis=1)
    g = differentiable(later, cotangent, jnp.zeros_like(initial), not reverse, chunk)
    first = initial[:, None]
    before = jnp.concatenate([states[:, 1:], first] if reverse else [first, states[:, :-1]], axis=1)
    end = -1 if reverse else 0
    shared = tuple(axis for axis, (n, m) in enumerate(zip(a.shape, g.shape)) if n != m)
    return jnp.sum(g * before, axis=shared, keepdims=True), g, a[:, end] * g[:, end]


differentiable.defvjp(save, gradients)


def chunked(a: Array, b: Array, initial: Array, reverse: bool, chunk: int) -> Array:
    """The composed map of each chunk; from these the state before each chunk; from that the states inside."""
    batch, length, *channels = b.shape
    chunk = min(chunk, length)
    widths = [(0, 0), (0, -length % chunk)] + [(0, 0)] * len(channels)
    a = jnp.pad(jnp.broadcast_to(a, b.shape), widths, constant_values=1)
    a, b = (x.reshape(batch, -1, chunk, *channels) for x in (a, jnp.pad(b, widths)))

    def at(i: Array) -> Array:
        return chunk - 1 - i if reverse else i

    def maps(i: Array) -> tuple[Array, Array]:
        factor, term = (jax.lax.dynamic_index_in_dim(x, at(i), axis=2, keepdims=False) for x in (a, b))
        return factor, term

    def compose(i: Array, whole: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, term = maps(i)
        return factor * whole[0], factor * whole[1] + term

    def cross(h: Array, whole: tuple[Array, ...]) -> tuple[Array, Array]:
        return whole[0] * h + whole[1], h

    def inside(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, term = maps(i)
        h = factor * carry[0] + term
        return h, jax.lax.dynamic_update_index_in_dim(carry[1], h, at(i), axis=2)

    if a.shape[1] > 1:
        identity = (jnp.ones_like(a[:, :, 0]), jnp.zeros_like(a[:, :, 0]))
        whole = jax.lax.fori_loop(0, chunk, compose, identity)
        by_chunk = tuple(jnp.swapaxes(x, 0, 1) for x in whole)
        starts = jnp.swapaxes(jax.lax.scan(cross, initial, by_chunk, reverse=reverse)[1], 0, 1)
    else:
        starts = initial[:, None]
    _, states = jax.lax.fori_loop(0, chunk, inside, (starts, jnp.zeros_like(b)))
    return states.reshape(batch, -1, *channels)[:, :length]
