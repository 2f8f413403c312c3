"""Hyena: gates and long convolutions in turn, with filters that a small network computes from the distance."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.long_convolution import long_convolution
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.short_convolution import ShortConvolution, symmetric_uniform
from llmjax.nn.sites import site

DECAY = (math.log(100) / 1.5, math.log(100) / 0.3)
"""A channel's window is exp(-decay t), t as in `features`, down to 1 / 100 at t = 1.5 to 0.3 (the authors' code)."""


@dataclass(frozen=True)
class Hyena(Mixer):
    """z_1 = v, z_{n+1} = x_n * (filter_n conv z_n), y = z_{order+1} W_out. Poli et al. 2023 (2302.10866).

    (v, x_1, ..., x_order) = conv(x W_in), a short convolution; filter_n(t) = window(t) network(features(t)), and a
    learned multiple of its input is added to what it convolves.

    There is no recurrence: decoding keeps the inputs of all long convolutions, order d_model numbers a token, a token
    costs O(cache) as in attention, and every call computes the filters anew for the whole cache. Packed rows take
    log(length) times as many FFTs.
    """

    order: int = 2
    """gates and long convolutions (the paper)"""
    taps: int = 3
    """tokens that the short convolution sees (the paper)"""
    filter_length: int = 2048
    """tokens that windows and features of the filters are scaled to; longer sequences extrapolate"""
    d_filter: int = 64
    """width of the filters' network (the paper)"""
    filter_layers: int = 2
    """layers between its first and its last (the authors' code)"""
    bands: int = 8
    """frequencies among its features"""
    frequency: float = 1.0
    """initial factor in its sines (the authors' code); a large one multiplies the rounding of half-precision weights"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return HyenaModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        for field in ("order", "taps", "filter_length", "d_filter", "bands"):
            if getattr(self, field) < 1:
                yield field, "must be at least 1"
        if self.filter_layers < 0:
            yield "filter_layers", "must not be negative"

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`past` `[batch, order, length, d_model]` and `conv` `[batch, taps - 1, (order + 1) d_model]` of `dtype`."""
        return {
            "conv": jnp.zeros((batch, self.taps - 1, (self.order + 1) * d_model), dtype),
            "past": jnp.zeros((batch, self.order, length, d_model), dtype),
        }

    def matmul_params(self, d_model: int) -> int:
        """The projections; the filters' network sees no token."""
        return (self.order + 2) * d_model * d_model

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Three real FFTs of 2 length points for each long convolution, 2 for each tap."""
        return d_model * (self.order * 15 * math.log2(2 * length) + 2 * self.taps * (self.order + 1))


class HyenaModule(nn.Module):
    """Owns `in`, `conv`, `filter` and `out`; sites v and gates (after the short convolution), z (what `out` reads)."""

    config: Hyena
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, over the cached inputs too."""
        c, width = self.config, self.d_model
        inner = (c.order + 1) * width
        kernel = self.initializer.kernel(width)
        z = Linear((width,), (inner,), ("d_model", "d_inner"), kernel, name="in")(x)
        before = None if state is None else state["conv"]
        z, before = ShortConvolution(inner, c.taps, True, name="conv")(z, context, before)
        z, gates = site(self, "v", z[..., :width]), site(self, "gates", z[..., width:])
        length = x.shape[1] if state is None else state["past"].shape[2]
        filters = Filters(c, width, name="filter")(length)
        past = []
        for n, gate in enumerate(jnp.split(gates, c.order, axis=-1)):
            if state is None:
                y = long_convolution(z, filters[n], context.segment_ids)
            else:
                past.append(store(state["past"][:, n], z, context.positions))
                y = read(past[-1], filters[n], context.positions)
            z = gate * y.astype(x.dtype)
        z = site(self, "z", z)
        residual = self.initializer.residual(width, self.layers)
        y = Linear((width,), (width,), ("d_inner", "d_model"), residual, name="out")(z)
        return y, None if state is None else {"conv": before, "past": jnp.stack(past, axis=1)}


class Filters(nn.Module):
    """Owns the network `0`, `1`, ..., `last` with its `frequency`, and `skip`, the multiple of the input."""

    config: Hyena
    d_model: int

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "order length d_model"]:
        """The filters at distances 0 to length - 1, float32."""
        c = self.config
        h = jnp.asarray(features(length, c.filter_length, c.bands), jnp.float32)
        frequency = parameter(self, "frequency", jax.nn.initializers.constant(c.frequency), (c.d_filter,), ("rank",))
        for i in range(c.filter_layers + 1):
            inputs = h.shape[-1]
            axes, initial = ("entries", "rank"), symmetric_uniform(inputs)
            h = jnp.sin(frequency * Linear((inputs,), (c.d_filter,), axes, initial, True, name=str(i))(h))
        axes, initial = ("rank", "d_inner"), symmetric_uniform(c.d_filter)
        h = Linear((c.d_filter,), (c.order * self.d_model,), axes, initial, name="last")(h).astype(jnp.float32)
        h = jnp.moveaxis(h.reshape(length, c.order, self.d_model), 1, 0)
        decay = jnp.linspace(*DECAY, self.d_model)
        h = h * jnp.exp(-decay * jnp.arange(length)[:, None] / c.filter_length)
        skip = parameter(self, "skip", jax.nn.initializers.normal(1.0), (c.order, self.d_model), ("entries", "d_inner"))
        return h.at[:, 0].add(skip.astype(jnp.float32))


def features(length: int, filter_length: int, bands: int) -> np.ndarray:
    """(t, cos(2 pi f t), -sin(2 pi f t)) of t = distance / filter_length, for `bands` frequencies f, 0 to bands - 1."""
    t = np.arange(length)[:, None] / filter_length
    angles = 2 * math.pi * t * np.linspace(1e-4, bands - 1, bands)
    return np.concatenate([t, np.cos(angles), -np.sin(angles)], axis=-1)


def store(
    past: Float[Array, "batch cache channels"],
    new: Float[Array, "batch length channels"],
    positions: Int[Array, "batch length"],
) -> Float[Array, "batch cache channels"]:
    """Write each token at its position, so that distances in the cache are those in the document; padding nowhere."""
    rows = jnp.arange(past.shape[0])[:, None]
    return past.at[rows, jnp.where(positions < 0, past.shape[1], positions)].set(new.astype(past.dtype), mode="drop")


def read(
    past: Float[Array, "batch cache channels"],
    kernel: Float[Array, "cache channels"],
    positions: Int[Array, "batch length"],
) -> Float[Array, "batch length channels"]:
    """The convolution at the given positions: one token by its sum, several by the FFT of the whole cache."""
    past = past.astype(jnp.float32)
    if positions.shape[1] > 1:
        return jnp.take_along_axis(long_convolution(past, kernel), jnp.maximum(positions, 0)[..., None], axis=1)
    distance = positions - jnp.arange(past.shape[1])
    weights = jnp.where(distance[..., None] < 0, 0, kernel[jnp.maximum(distance, 0)])
    return jnp.sum(past * weights, axis=1, keepdims=True)
