"""The selective scan on Hopper GPUs (sm_90a) with Pallas Mosaic GPU, forward pass and gradient (Gu and Dao 2023).

Step, decay, input, readout, skip and gate of a token are computed on chip and the states never leave it, but for one in
every `BLOCK` tokens, from which the backward pass computes the others again (2312.00752, section 3.3.2).
"""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._compat import gpu_kernel, gpu_load
from pallas_kernels.segments import absent_as_zero
from pallas_kernels.selective_scan.hopper_backward import backward
from pallas_kernels.selective_scan.hopper_blocks import (
    ALONE,
    BLOCK,
    CHANNELS,
    LARGEST_STATE,
    LOG2E,
    TILE,
    Operands,
    Problem,
    Spot,
    Token,
    arranged,
    arrays_of,
    fetch,
    grid,
    shape_of,
    sigmoid,
    spread_bias,
    steps,
    token_buffers,
)
from pallas_kernels.selective_scan.inputs import Tokens, Weights

__all__ = ["refusal", "scan"]

READ = ("x", "dt", "z", "B", "C", "marks")
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def refusal(tokens: Tokens, weights: Weights) -> str | None:
    """Why the kernels cannot do it, or None."""
    state = weights.A.shape[1]
    if state > LARGEST_STATE:
        return f"takes a state of at most {LARGEST_STATE} numbers a channel, not {state}"
    for name in ("x", "dt", "z"):
        value = getattr(tokens, name)
        if value is not None and value.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, not {name} of {value.dtype}"
    return None


def scan(
    tokens: Tokens, weights: Weights, initial: Float[Array, "batch width state"], reverse: bool, dt_softplus: bool
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width state"]]:
    """y and the last state; tokens, channels of a group and state are filled up to what the kernels take."""
    length, width = tokens.x.shape[1:]
    groups, state = tokens.B.shape[2:]
    each = width // groups
    padded_state = max(8, 1 << (state - 1).bit_length())

    def fill(value: Array, channels: int | None = None, states: int | None = None, length: bool = False) -> Array:
        if channels is not None and each % CHANNELS:
            lead, tail = value.shape[:channels], value.shape[channels + 1 :]
            value = end_with_zeros(value.reshape(*lead, groups, each, *tail), channels + 1, CHANNELS)
            value = value.reshape(*lead, -1, *tail)
        value = value if states is None else end_with_zeros(value, states, padded_state)
        return end_with_zeros(value, 1, BLOCK) if length else value

    def weight(value: Array | None) -> Array:
        return fill(jnp.zeros(width) if value is None else value.astype(jnp.float32), channels=0)

    B, C = (absent_as_zero(tokens.marks, v).astype(jnp.float32) for v in (tokens.B, tokens.C))
    operands = Operands(
        fill(tokens.x, 2, length=True),
        fill(tokens.dt, 2, length=True),
        None if tokens.z is None else fill(tokens.z, 2, length=True),
        fill(B, states=3, length=True),
        fill(C, states=3, length=True),
        fill(weights.A.astype(jnp.float32), 0, 1),
        weight(weights.D),
        weight(weights.dt_bias),
        fill(initial, 1, 2),
    )
    problem = Problem(length, groups, reverse, dt_softplus, tokens.z is not None)
    y, final = on_chip(problem, operands, arranged(tokens.marks, length))
    y = y[:, :length].reshape(*y.shape[:1], length, groups, -1)[..., :each].reshape(tokens.x.shape)
    return y, final.reshape(final.shape[0], groups, -1, padded_state)[:, :, :each, :state].reshape(initial.shape)


def end_with_zeros(value: Array, axis: int, multiple: int) -> Array:
    """`value` with zeros after it up to a multiple along an axis."""
    extra = -value.shape[axis] % multiple
    return jnp.pad(value, [(0, extra if i == axis else 0) for i in range(value.ndim)]) if extra else value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def on_chip(
    problem: Problem, operands: Operands, marks: Float[Array, "batch blocks 2 block"] | None
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width state"]]:
    """y and the last state."""
    y, final, _ = forward(problem, operands, marks, keep=False)
    return y, final


def save(problem: Problem, operands: Operands, marks: Array | None) -> tuple[tuple[Array, Array], tuple]:
    """The forward pass, and what the backward pass needs: the inputs and the state before each block of tokens."""
    y, final, states = forward(problem, operands, marks, keep=True)
    return (y, final), (operands, marks, states)


def gradients(problem: Problem, saved: tuple, cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    """The backward pass."""
    operands, marks, states = saved
    return backward(problem, operands, marks, states, *cotangents), None


on_chip.defvjp(save, gradients)


@dataclass(frozen=True)
class Forward:
    """The forward kernel of one shape."""

    problem: Problem

    def body(self, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
        """All tokens of one strip of channels of one sequence."""
        r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch, layout=ALONE)
        spot = Spot.here(self.problem.groups, r.x.shape[2])
        for step in range(min(2, self.problem.blocks)):
            fetch(r, spot, READ, self.problem.place(step), step)
        spread_bias(r, spot)
        r.A_here = gpu_load(r.A.at[spot.channels], ALONE) * LOG2E
        r.D_here = gpu_load(r.D.at[spot.channels], ALONE.reduce(1))
        h = gpu_load(r.initial.at[spot.batch, spot.channels], ALONE)
        h = lax.fori_loop(0, self.problem.blocks, lambda step, h: self.block(r, spot, step, h), h)
        r.final[spot.batch, spot.channels] = h
        plgpu.wait_smem_to_gmem(0)

    def block(
        self, r: SimpleNamespace, spot: Spot, step: Any, h: Float[Array, "channels state"]
    ) -> Float[Array, "channels state"]:
        """The state after a block of tokens; its y is written."""
        slot, place = lax.rem(step, jnp.int32(2)), self.problem.place(step)
        if hasattr(r, "states"):
            r.states[spot.batch, place, spot.channels] = h
        plgpu.barrier_wait(r.full.at[slot])
        r.steps[...], _ = steps(r, slot, self.problem.softplus)
        if self.problem.gated:
            z = gpu_load(r.z_in.at[slot], TILE).astype(jnp.float32)
            r.gates[...] = z * sigmoid(z)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        count = self.problem.count(place)
        h = lax.fori_loop(0, count, lambda k, h: self.token(r, slot, self.problem.token(k, count), h), h)
        plgpu.commit_smem()  # every warp has read the inputs and written its part of y
        plgpu.copy_smem_to_gmem(r.y_out, r.y.at[spot.batch, pl.ds(place * BLOCK, BLOCK), spot.channels])
        later = step + 2
        pl.when(later < self.problem.blocks)(lambda: fetch(r, spot, READ, self.problem.place(later), slot))
        return h

    def token(self, r: SimpleNamespace, slot: Any, t: Any, h: Array) -> Array:
        """h = exp(dt A) h + dt B x, y = (C . h + D x) gate."""
        token = Token(r, slot, t)
        step, x = token.tile(r.steps), token.given("x")
        h = token.decay(token.wide(step)) * h + token.wide(step * x) * token.group("B")
        y = jnp.sum(h * token.group("C"), axis=1) + r.D_here * x
        y = y * token.tile(r.gates) if self.problem.gated else y
        r.y_out[t] = token.clear(y).astype(r.y.dtype)
        return h


def forward(
    problem: Problem, operands: Operands, marks: Float[Array, "batch blocks 2 block"] | None, keep: bool
) -> tuple[Array, Array, Float[Array, "batch blocks width state"] | None]:
    """y, the last state and, with `keep`, the state before each block of tokens."""
    arrays, initial = arrays_of(operands, marks), operands.initial
    outputs = {"y": shape_of(operands.x), "final": shape_of(initial)}
    if keep:
        shape = (initial.shape[0], problem.blocks, *initial.shape[1:])
        outputs["states"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    tile, names = (BLOCK, CHANNELS), (*arrays, *outputs)
    kernel = Forward(problem)
    found = gpu_kernel(
        lambda *refs, **scratch: kernel.body(names, *refs, **scratch),
        out_type=tuple(outputs.values()),
        scratch=token_buffers(arrays, READ)
        | {"steps": plgpu.SMEM(tile, jnp.float32), "bias_tile": plgpu.SMEM(tile, jnp.float32)}
        | ({"gates": plgpu.SMEM(tile, jnp.float32)} if problem.gated else {})
        | {"y_out": plgpu.SMEM(tile, operands.x.dtype)},
        grid=grid(operands),
        warpgroups=1,
        name="selective_scan_forward",
    )(*arrays.values())
    return found[0], found[1], found[2] if keep else None
