"""The selective scan on Hopper GPUs (sm_90a) with Pallas Mosaic GPU, backward pass.

Blocks of tokens are taken against time, and so are the parts of a block for which shared memory keeps a_t h_{t-1},
computed again from the state before the block. With a_t = exp(dt_t A) and g_t the gradient of h_t,

    g_t = a_{t+1} g_{t+1} + dy_t C_t,   dC_t = sum_channels dy_t h_t,   dB_t = sum_channels dt_t x_t g_t,
    d(dt_t x_t) = g_t . B_t,   d dt_t = sum_state g_t A a_t h_{t-1} + x_t (g_t . B_t),   dA = sum_t dt_t g_t a_t h_{t-1}

(Gu and Dao 2023, 2312.00752, section 3.3.2, by recomputation). Sums over the channels of different blocks of threads
and over sequences are XLA's, of partial sums in a fixed order: runs repeat bit by bit.
"""

from collections.abc import Callable
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
from pallas_kernels.selective_scan.hopper_blocks import (
    BLOCK,
    CHANNELS,
    LN2,
    LOG2E,
    SHARED,
    TILE,
    Operands,
    Problem,
    Spot,
    Token,
    arrays_of,
    fetch,
    grid,
    shape_of,
    sigmoid,
    spread_bias,
    steps,
    token_buffers,
    zeros,
)

KEPT = 128
"""Numbers of a channel's states for which there is shared memory, 64 KiB: with a state of 16 half a block of tokens."""
READ = ("x", "dt", "z", "B", "C", "marks", "d_y")
Sums = tuple[Array, Array, Array, Array]
"""Gradients so far: of the state [channels, state], of A [channels, state], of D and of the bias [channels]."""


@dataclass(frozen=True)
class Backward:
    """The backward kernel of one shape."""

    problem: Problem

    def body(self, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
        """All tokens of one strip of channels of one sequence, against time."""
        r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch, layout=SHARED)
        spot, blocks = Spot.here(self.problem.groups, r.x.shape[2]), self.problem.blocks
        for step in range(min(2, blocks)):
            fetch(r, spot, READ, self.problem.place(blocks - 1 - step), step)
        spread_bias(r, spot)
        r.A_here = gpu_load(r.A.at[spot.channels], SHARED) * LOG2E
        r.D_here = gpu_load(r.D.at[spot.channels], SHARED.reduce(1))
        d_h = gpu_load(r.d_final.at[spot.batch, spot.channels], SHARED)
        sums = (
            d_h,
            zeros(d_h.shape, SHARED),
            zeros((CHANNELS,), SHARED.reduce(1)),
            zeros((CHANNELS,), SHARED.reduce(1)),
        )
        sums = lax.fori_loop(0, blocks, lambda step, sums: self.block(r, spot, step, sums), sums)
        for name, total in zip(("d_initial", "d_A", "d_D", "d_bias"), sums, strict=True):
            getattr(r, name)[spot.batch, spot.channels] = total
        plgpu.wait_smem_to_gmem(0)

    def block(self, r: SimpleNamespace, spot: Spot, step: Any, sums: Sums) -> Sums:
        """One block of tokens; the gradients of its values are written."""
        slot, place = lax.rem(step, jnp.int32(2)), self.problem.place(self.problem.blocks - 1 - step)
        plgpu.barrier_wait(r.full.at[slot])
        self.prepare(r, slot)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        count, length, parts = self.problem.count(place), r.kept.shape[0], BLOCK // r.kept.shape[0]

        def token(k: Any) -> Token:
            return Token(r, slot, self.problem.token(k, count))

        def part(index: Any, sums: Sums) -> Sums:
            first = jnp.minimum((parts - 1 - index) * length, count)
            h = gpu_load(r.states.at[spot.batch, place, spot.channels], SHARED)
            return self.part(r, token, h, first, jnp.minimum(count - first, length), sums)

        sums = lax.fori_loop(0, parts, part, sums)
        plgpu.commit_smem()  # every warp has read the inputs and written its part of the gradients
        tokens = pl.ds(place * BLOCK, BLOCK)
        for name in ("d_x", "d_dt", "d_z") if self.problem.gated else ("d_x", "d_dt"):
            target = getattr(r, name).at[spot.batch, tokens, spot.channels]
            plgpu.copy_smem_to_gmem(getattr(r, f"{name}_out"), target)
        for name in ("d_B", "d_C"):
            plgpu.copy_smem_to_gmem(getattr(r, f"{name}_out"), getattr(r, name).at[spot.strip, spot.batch, tokens])
        following = self.problem.place(self.problem.blocks - 3 - step)
        pl.when(step + 2 < self.problem.blocks)(lambda: fetch(r, spot, READ, following, slot))
        return sums

    def prepare(self, r: SimpleNamespace, slot: Any) -> None:
        """Steps and their slopes, the gradient of C . h + D x, and what that is to be multiplied with for z's."""
        r.steps[...], slopes = steps(r, slot, self.problem.softplus)
        if slopes is not None:
            r.slopes[...] = slopes
        if self.problem.gated:
            z, d_y = (gpu_load(buffer.at[slot], TILE).astype(jnp.float32) for buffer in (r.z_in, r.d_y_in))
            share = sigmoid(z)
            r.d_sum[...] = d_y * z * share
            r.d_gate[...] = d_y * share * (1.0 + z * (1.0 - share))

    def part(
        self, r: SimpleNamespace, token: Callable[[Any], Token], h: Array, first: Any, count: Any, sums: Sums
    ) -> Sums:
        """`count` tokens of a block from `first` on, `h` the state before the block."""
        h = lax.fori_loop(0, first, lambda k, h: self.advance(r, token(k), h)[1], h)
        lax.fori_loop(0, count, lambda k, h: self.keep(r, token(first + k), k, h), h)
        plgpu.commit_smem()

        def back(k: Any, sums: Sums) -> Sums:
            last = count - 1 - k
            return self.token(r, token(first + last), last, sums)

        return lax.fori_loop(0, count, back, sums)

    def advance(self, r: SimpleNamespace, token: Token, h: Array) -> tuple[Array, Array]:
        """(a_t h_{t-1}, h_t)."""
        step = token.tile(r.steps)
        before = token.decay(token.wide(step)) * h
        return before, before + token.wide(step * token.given("x")) * token.group("B")

    def keep(self, r: SimpleNamespace, token: Token, k: Any, h: Array) -> Array:
        """The state after a token; its part from before is kept. The gradient of z needs the readout again."""
        r.kept[k], h = self.advance(r, token, h)
        if self.problem.gated:
            y = jnp.sum(h * token.group("C"), axis=1) + r.D_here * token.given("x")
            r.d_z_out[token.t] = (y * token.tile(r.d_gate)).astype(r.d_z.dtype)
        return h

    def token(self, r: SimpleNamespace, token: Token, k: Any, sums: Sums) -> Sums:
        """The equations above."""
        d_h, d_A, d_D, d_bias = sums
        step, x = token.tile(r.steps), token.given("x")
        d_sum = token.tile(r.d_sum) if self.problem.gated else token.given("d_y")
        B, kept = token.group("B"), gpu_load(r.kept.at[k], SHARED)
        wide_step, wide_input, wide_sum = (token.wide(row) for row in (step, step * x, d_sum))
        r.d_C_out[token.t] = jnp.sum(wide_sum * (kept + wide_input * B), axis=0)
        d_h = d_h + wide_sum * token.group("C")
        r.d_B_out[token.t] = jnp.sum(wide_input * d_h, axis=0)
        d_input = jnp.sum(d_h * B, axis=1)
        r.d_x_out[token.t] = (d_input * step + r.D_here * d_sum).astype(r.d_x.dtype)
        d_kept = d_h * kept
        d_step = jnp.sum(d_kept * r.A_here, axis=1) * LN2 + d_input * x
        d_step = d_step * token.tile(r.slopes) if self.problem.softplus else token.clear(d_step)
        r.d_dt_out[token.t] = d_step.astype(r.d_dt.dtype)
        d_h = d_h * token.decay(wide_step)
        return d_h, d_A + d_kept * wide_step, d_D + d_sum * x, d_bias + d_step


def backward(
    problem: Problem,
    operands: Operands,
    marks: Float[Array, "batch blocks 2 block"] | None,
    states: Float[Array, "batch blocks width state"],
    d_y: Float[Array, "batch length width"],
    d_final: Float[Array, "batch width state"],
) -> Operands:
    """The gradients of all operands."""
    batch, length, width = operands.x.shape
    state = operands.A.shape[1]
    arrays = arrays_of(operands, marks) | {"states": states, "d_y": d_y, "d_final": d_final}
    per_state, strips = shape_of(operands.initial), width // CHANNELS
    per_channel = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    partial = jax.ShapeDtypeStruct((strips, batch, length, state), jnp.float32)
    outputs = {"d_x": shape_of(operands.x), "d_dt": shape_of(operands.dt)}
    outputs |= {"d_z": shape_of(operands.z)} if operands.z is not None else {}
    outputs |= {"d_B": partial, "d_C": partial}
    outputs |= {"d_A": per_state, "d_D": per_channel, "d_bias": per_channel, "d_initial": per_state}
    names, kernel = (*arrays, *outputs), Backward(problem)
    found = gpu_kernel(
        lambda *refs, **scratch: kernel.body(names, *refs, **scratch),
        out_type=tuple(outputs.values()),
        scratch=token_buffers(arrays, READ) | working_buffers(problem, state) | output_buffers(outputs),
        grid=grid(operands),
        warpgroups=1,
        name="selective_scan_backward",
    )(*arrays.values())
    r = SimpleNamespace(**dict(zip(outputs, found, strict=True)))
    d_B, d_C = (jnp.sum(v.reshape(problem.groups, -1, *v.shape[1:]), axis=1) for v in (r.d_B, r.d_C))
    d_B, d_C = (jnp.moveaxis(v, 0, 2) for v in (d_B, d_C))
    d_A, d_D, d_bias = (jnp.sum(v, axis=0) for v in (r.d_A, r.d_D, r.d_bias))
    return Operands(r.d_x, r.d_dt, getattr(r, "d_z", None), d_B, d_C, d_A, d_D, d_bias, r.d_initial)


def working_buffers(problem: Problem, state: int) -> dict[str, Any]:
    """Shared memory for what is computed of a block before its tokens are taken one by one."""
    names = ["bias_tile", "steps"]
    names += ["slopes"] if problem.softplus else []
    names += ["d_sum", "d_gate"] if problem.gated else []
    swizzle = plgpu.TilingTransform((8, state)), plgpu.SwizzleTransform(4 * state)
    kept = plgpu.SMEM((min(BLOCK, KEPT // state), CHANNELS, state), jnp.float32, transforms=swizzle)
    return {name: plgpu.SMEM((BLOCK, CHANNELS), jnp.float32) for name in names} | {"kept": kept}


def output_buffers(outputs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Shared memory for a block of each gradient that belongs to tokens."""
    sizes = {"d_x": CHANNELS, "d_dt": CHANNELS, "d_z": CHANNELS, "d_B": None, "d_C": None}
    return {
        f"{name}_out": plgpu.SMEM((BLOCK, sizes[name] or shape.shape[-1]), shape.dtype)
        for name, shape in outputs.items()
        if name in sizes
    }
