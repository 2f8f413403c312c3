"""What the forward and the backward kernel of the selective scan on Hopper GPUs share.

A block of threads has one warpgroup and the states of `CHANNELS` channels of one sequence, [channels, state], in
registers. It takes `BLOCK` tokens at a time, whose values the copy engine brings to shared memory while the block
before is worked on (TMA, two buffers).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._compat import gpu_load
from pallas_kernels.segments import Marks

LOG2E, LN2 = math.log2(math.e), math.log(2)
BLOCK, CHANNELS = 16, 128
"""Tokens between states that are kept; channels of a block of threads."""
LARGEST_STATE = 32
"""Numbers of a channel's state for which the backward kernel has registers and shared memory."""
FORGET = -1e30
"""The base-2 logarithm of the decay where a segment begins: 2 to this power is 0."""
TILE = plgpu.Layout.WG_STRIDED((BLOCK, CHANNELS), vec_size=4)
ALONE, SHARED = plgpu.Layout.TCGEN05_TMEM_NATIVE(4), plgpu.Layout.WGMMA
"""How states lie in registers: a thread has a channel, so that sums over the state stay in it; or four threads share
each of four channels, so that sums over channels, of which the backward pass has many, take half the exchanges."""
ATANH = (0.13433775305747986, 0.14116978645324707, 0.2000383585691452, 0.33333319425582886)
"""(atanh(s) - s) / s^3 as a polynomial in s^2, from the highest power down, relative error 2e-8 for |s| <= 1 / 3"""


@dataclass(frozen=True)
class Problem:
    """What is static about a scan."""

    length: int
    """tokens that are there, of a multiple of `BLOCK`"""
    groups: int
    reverse: bool
    softplus: bool
    gated: bool
    """there is a z"""

    @property
    def blocks(self) -> int:
        """Blocks of tokens."""
        return -(-self.length // BLOCK)

    def place(self, step: Any) -> Any:
        """The block of tokens of a step."""
        return self.blocks - 1 - step if self.reverse else step

    def count(self, place: Any) -> Any:
        """Tokens of a block that are there."""
        return jnp.minimum(BLOCK, self.length - place * BLOCK) if self.length % BLOCK else BLOCK

    def token(self, step: Any, count: Any) -> Any:
        """The token of a step within its block."""
        return count - 1 - step if self.reverse else step


class Operands(NamedTuple):
    """What gradients flow to; length and width are padded, B, C and all weights float32."""

    x: Float[Array, "batch length width"]
    dt: Float[Array, "batch length width"]
    z: Float[Array, "batch length width"] | None
    B: Float[Array, "batch length groups state"]
    C: Float[Array, "batch length groups state"]
    A: Float[Array, "width state"]
    D: Float[Array, " width"]
    dt_bias: Float[Array, " width"]
    initial: Float[Array, "batch width state"]


class Spot(NamedTuple):
    """Where a block of threads works."""

    batch: Any
    strip: Any
    """of the channels"""
    group: Any
    channels: Any
    """of the strip"""

    @classmethod
    def here(cls, groups: int, width: int) -> "Spot":
        """By the grid's indices; `width` in channels."""
        strip = lax.axis_index("strip")
        group = lax.div(strip, jnp.int32(width // CHANNELS // groups))
        return cls(lax.axis_index("batch"), strip, group, pl.ds(strip * CHANNELS, CHANNELS))


def grid(operands: Operands) -> dict[str, int]:
    """A block of threads for every sequence and strip of channels."""
    return {"batch": operands.x.shape[0], "strip": operands.x.shape[2] // CHANNELS}


def arrays_of(operands: Operands, marks: Array | None) -> dict[str, Array]:
    """What the kernels read, by name."""
    named = operands._asdict() | {"marks": marks}
    return {name: array for name, array in named.items() if array is not None}


def token_buffers(arrays: Mapping[str, Array], names: tuple[str, ...]) -> dict[str, Any]:
    """Two buffers for a block of each array of tokens, and the barriers that tell when they are full."""
    found = [name for name in names if name in arrays]
    shapes = dict.fromkeys(("B", "C"), (BLOCK, arrays["B"].shape[3])) | {"marks": (2, BLOCK)}
    buffers: dict[str, Any] = {
        f"{name}_in": plgpu.SMEM((2, *shapes.get(name, (BLOCK, CHANNELS))), arrays[name].dtype) for name in found
    }
    return buffers | {"full": plgpu.Barrier(num_arrivals=len(found), num_barriers=2)}


def fetch(r: SimpleNamespace, spot: Spot, names: tuple[str, ...], place: Any, slot: Any) -> None:
    """Begin to copy a block of the arrays of tokens."""
    tokens = pl.ds(place * BLOCK, BLOCK)
    parts = dict.fromkeys(("B", "C"), (tokens, spot.group)) | {"marks": (place,)}
    for name in names:
        if hasattr(r, name):
            source = getattr(r, name).at[(spot.batch, *parts.get(name, (tokens, spot.channels)))]
            plgpu.copy_gmem_to_smem(source, getattr(r, f"{name}_in").at[slot], r.full.at[slot])


class Token:
    """Values of one token in registers; what an absent one holds is zero."""

    def __init__(self, r: SimpleNamespace, slot: Any, t: Any) -> None:
        self.r, self.slot, self.t = r, slot, t
        packed = hasattr(r, "marks")
        self.present = r.marks_in[slot, 0, t] > 0 if packed else None
        self.start = r.marks_in[slot, 1, t] if packed else None

    def tile(self, tile: Any) -> Float[Array, " channels"]:
        """The token's row of a tile [block, channels], float32."""
        return self.clear(gpu_load(tile.at[self.t], self.r.layout.reduce(1)).astype(jnp.float32))

    def given(self, name: str) -> Float[Array, " channels"]:
        """The token's channels of an array."""
        return self.tile(getattr(self.r, f"{name}_in").at[self.slot])

    def group(self, name: str) -> Float[Array, "channels state"]:
        """B or C of the token, for all channels."""
        row = gpu_load(getattr(self.r, f"{name}_in").at[self.slot, self.t], self.r.layout.reduce(0))
        return self.wide(row, axis=1)

    def wide(self, row: Float[Array, " numbers"], axis: int = 0) -> Float[Array, "channels state"]:
        """A number of each channel for all numbers of its state; with axis 1 a number of the state for all channels."""
        spread = lax.broadcast_in_dim(row, (CHANNELS, self.r.A.shape[1]), [axis])
        return plgpu.layout_cast(spread, self.r.layout)

    def clear(self, row: Float[Array, " channels"]) -> Float[Array, " channels"]:
        """Zeros where the token is absent."""
        return row if self.present is None else jnp.where(self.present, row, 0.0)

    def decay(self, step: Float[Array, "channels state"]) -> Float[Array, "channels state"]:
        """exp(step A); 0 where the token begins a segment."""
        power = step * self.r.A_here
        return jnp.exp2(power if self.start is None else power + self.start)


def softplus(v: Array) -> tuple[Array, Array]:
    """(log(1 + exp(v)), its slope), to a few roundings also where it is small.

    log(1 + e) = 2 atanh(e / (2 + e)): the hardware's logarithm has an absolute error of 2^-22 near 1.
    """
    e = jnp.exp2(jnp.minimum(v, -v) * LOG2E)
    s = e / (2.0 + e)
    square = s * s
    series = jnp.full_like(v, ATANH[0])
    for coefficient in ATANH[1:]:
        series = series * square + coefficient
    return jnp.maximum(v, 0.0) + 2.0 * (s + s * square * series), jnp.where(v >= 0, 1.0, e) / (1.0 + e)


def steps(r: SimpleNamespace, slot: Any, softly: bool) -> tuple[Array, Array | None]:
    """Steps of a block [block, channels], and where they are a softplus its slope."""
    raw = gpu_load(r.dt_in.at[slot], TILE).astype(jnp.float32) + gpu_load(r.bias_tile, TILE)
    return softplus(raw) if softly else (raw, None)


def sigmoid(v: Array) -> Array:
    """1 / (1 + exp(-v))."""
    return 1.0 / (1.0 + jnp.exp2(v * -LOG2E))


def spread_bias(r: SimpleNamespace, spot: Spot) -> None:
    """The bias of the steps for every token of a block, so that it is added to a tile."""
    bias = gpu_load(r.dt_bias.at[spot.channels], r.layout.reduce(1))
    for t in range(BLOCK):
        r.bias_tile[t] = bias
    plgpu.commit_smem()


def zeros(shape: tuple[int, ...], layout: Any) -> Array:
    """Float32 zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def arranged(found: Marks | None, length: int) -> Float[Array, "batch blocks 2 block"] | None:
    """Marks of tokens by blocks: 1 where the token is there, and what is added to its decay's logarithm."""
    if found is None:
        return None
    values = jnp.stack([found.present.astype(jnp.float32), jnp.where(found.reset, FORGET, 0.0)], axis=1)
    values = jnp.pad(values, ((0, 0), (0, 0), (0, -length % BLOCK)))
    return jnp.swapaxes(values.reshape(*values.shape[:2], -1, BLOCK), 1, 2)


def shape_of(array: Array) -> jax.ShapeDtypeStruct:
    """What an array is without its numbers."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
