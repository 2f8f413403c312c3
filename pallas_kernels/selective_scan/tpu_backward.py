"""The selective scan on TPU, backward pass: from the state before each block of tokens, the last block first.

With a_t = exp(dt_t A), y_t = (C_t . h_t + D x_t) silu(z_t) and dr_t = dy_t silu(z_t), the gradient of a state,
g_t = dr_t C_t + a_{t+1} g_{t+1}, gives, with sums over states n, channels d and tokens t,

    dx_t = dt_t sum_n g_t B_t + D dr_t,    d_dt_t = x_t sum_n g_t B_t + sum_n A g_t a_t h_{t-1},
    dB_t = sum_d g_t dt_t x_t,    dC_t = sum_d dr_t h_t,    dA = sum_t dt_t g_t a_t h_{t-1}.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.selective_scan.tpu_blocks import (
    LANES,
    LOG2E,
    ORDER,
    TOGETHER,
    VMEM_BYTES,
    Operands,
    Plan,
    decay_of,
    only,
    over,
    raw_steps,
    softplus,
    spread,
)


class Scratch(NamedTuple):
    """Vector memory of the kernel. Sums over time are kept for all blocks of channels of a part."""

    g: Any
    """[blocks, state, channels]: the gradient of the state after the block"""
    d_a: Any
    """[blocks, state, channels]"""
    d_d: Any
    """[blocks, TOGETHER, channels]: sums over every `TOGETHER`th token"""
    d_bias: Any
    """the same"""
    states: Any
    """[block + 1, state, channels], in the direction of the recurrence: before each token, and the last"""
    dt: Any
    """[block, channels]"""
    B: Any
    """[block, state, lanes]"""
    C: Any
    keep: Any
    d_b: Any
    """[block, state, lanes]: sums over every `LANES`th channel"""
    d_c: Any


def backward(
    plan: Plan,
    operands: Operands,
    starts: Float[Array, "batch blocks state width"],
    dy: Float[Array, "batch length width"],
    d_final: Float[Array, "batch state width"],
) -> Operands:
    """The gradient of every operand from those of y and the last state; `starts` are the states before each block."""
    batch, parts, times, _ = plan.grid

    def time(t: Any) -> Any:
        return t if plan.reverse else times - 1 - t

    def like(value: Array | None) -> Any:
        return None if value is None else jax.ShapeDtypeStruct(value.shape, value.dtype)

    def total(values: Array | None) -> Array | None:
        return None if values is None else values.sum(0)

    def narrow(values: Array, like: Array) -> Array:
        """The sum of a group's parts, token by token."""
        values = values.reshape(batch, plan.groups, plan.splits, times, plan.state, plan.block).sum(2)
        return jnp.swapaxes(values, 3, 4).reshape(like.shape).astype(like.dtype)

    specs = plan.specs(time)
    sums = pl.BlockSpec((None, None, None, plan.state, plan.block), lambda b, p, t, d: (b, p, time(t), 0, 0))
    row, states = (plan.at_step(times - 1, rows) for rows in (1, plan.state))
    out_specs: list[Any] = [specs.x, specs.dt, sums, sums, states, row, specs.z, row, None, states]
    by_token, by_channel, by_state = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (
            (batch, parts, times, plan.state, plan.block),
            (batch, 1, plan.width),
            (batch, plan.state, plan.width),
        )
    )
    out_shape: list[Any] = [like(operands.x), like(operands.dt), by_token, by_token, by_state, by_channel]
    out_shape += [like(operands.z), by_channel, None, by_state]
    (gradients,) = pl.pallas_call(
        functools.partial(backward_kernel, plan),
        grid=plan.grid,
        in_specs=[only(operands, specs), plan.starts(time), specs.x, plan.at_step(0, plan.state)],
        out_specs=[only(operands, out_specs)],
        out_shape=[only(operands, out_shape)],
        scratch_shapes=[memory(plan, operands)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=ORDER, vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=plan.cost(22, 2, operands, starts, operands.x),
        name="selective_scan_backward",
    )(operands, starts, dy, d_final)
    return gradients._replace(
        B=narrow(gradients.B, operands.B),
        C=narrow(gradients.C, operands.C),
        A=total(gradients.A),
        D=total(gradients.D),
        dt_bias=total(gradients.dt_bias),
        keep=None if operands.keep is None else jnp.zeros_like(operands.keep),
    )


def memory(plan: Plan, operands: Operands) -> Scratch:
    """What the kernel needs for these operands."""
    blocks = plan.grid[3]
    lanes, rows = plan.vector(plan.block, plan.state, LANES), plan.vector(blocks, TOGETHER, plan.channels)
    states, tokens = plan.vector(blocks, plan.state, plan.channels), plan.vector(plan.block, plan.channels)
    return Scratch(
        *(states, states, None if operands.D is None else rows, None if operands.dt_bias is None else rows),
        *(plan.vector(plan.block + 1, plan.state, plan.channels), tokens),
        *(lanes, lanes, None if operands.keep is None else lanes, lanes, lanes),
    )


def backward_kernel(plan: Plan, blocks: Any, starts: Any, dy: Any, d_final: Any, out: Any, scratch: Scratch) -> None:
    """One block of tokens and channels: its states once more, then their gradients from the last to the first."""
    time, channels = pl.program_id(2), pl.program_id(3)

    @pl.when(time == 0)
    def begin() -> None:
        scratch.g[channels] = d_final[...]
        for sums in (scratch.d_a, scratch.d_d, scratch.d_bias):
            if sums is not None:
                sums[channels] = jnp.zeros_like(sums[channels])

    @pl.when(channels == 0)
    def spread_columns() -> None:
        spread(blocks.B, scratch.B)
        spread(blocks.C, scratch.C)
        if scratch.keep is not None:
            spread(blocks.keep, scratch.keep)
        scratch.d_b[...] = jnp.zeros_like(scratch.d_b)
        scratch.d_c[...] = jnp.zeros_like(scratch.d_c)

    A = blocks.A[...] * LOG2E
    again(plan, blocks, A, starts, scratch)
    descend(plan, blocks, A, dy, channels, out, scratch)

    @pl.when(channels == pl.num_programs(3) - 1)
    def sum_lanes() -> None:
        across_lanes(scratch.d_b, out.B)
        across_lanes(scratch.d_c, out.C)

    @pl.when(time == pl.num_programs(2) - 1)
    def end() -> None:
        out.initial[...] = scratch.g[channels]
        out.A[...] = scratch.d_a[channels]
        for sums, row in ((scratch.d_d, out.D), (scratch.d_bias, out.dt_bias)):
            if sums is not None:
                row[...] = jnp.sum(sums[channels], axis=0, keepdims=True)


def again(plan: Plan, blocks: Any, A: Array, starts: Any, scratch: Scratch) -> None:
    """Steps and states of the block's tokens."""

    def some_tokens(group: Any, h: Array) -> Array:
        tokens = plan.tokens(group)
        raw = raw_steps(blocks, tokens)
        dt = softplus(raw) if plan.softplus else raw
        dx = dt * blocks.x[tokens, :].astype(jnp.float32)
        scratch.dt[tokens, :] = dt
        B = scratch.B[tokens]
        keep = None if scratch.keep is None else scratch.keep[tokens]
        for i, row in enumerate(plan.rows):
            decay = decay_of(plan, dt[row : row + 1], A, keep, row)
            h = decay * h + dx[row : row + 1] * over(B[row], plan.channels)
            scratch.states[group * TOGETHER + i + 1] = h
        return h

    scratch.states[0] = starts[...]
    jax.lax.fori_loop(0, plan.block // TOGETHER, some_tokens, starts[...])


def descend(plan: Plan, blocks: Any, A: Array, dy: Any, channels: Any, out: Any, scratch: Scratch) -> None:
    """The gradients of the block's tokens, whose states are known, and what they add to the sums over time."""
    groups = plan.block // TOGETHER

    def some_tokens(count: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        group = groups - 1 - count
        tokens = plan.tokens(group)
        x, dt = blocks.x[tokens, :].astype(jnp.float32), scratch.dt[tokens, :]
        d_out = dy[tokens, :].astype(jnp.float32)
        z = None if blocks.z is None else blocks.z[tokens, :].astype(jnp.float32)
        dr = d_out if z is None else d_out * jax.nn.silu(z)
        carry, (inputs, steps, readout) = each_token(plan, A, group, (dt, dt * x, dr), z is not None, carry, scratch)
        dx, d_dt = inputs * dt, inputs * x + steps
        if blocks.D is not None:
            dx, readout = dx + blocks.D[...] * dr, readout + blocks.D[...] * x
            scratch.d_d[channels] += dr * x
        if plan.softplus:
            d_dt *= jax.nn.sigmoid(raw_steps(blocks, tokens))
        if z is not None:
            rise = jax.nn.sigmoid(z)
            out.z[tokens, :] = (d_out * readout * rise * (1 + z * (1 - rise))).astype(out.z.dtype)
        if scratch.d_bias is not None:
            scratch.d_bias[channels] += d_dt
        out.x[tokens, :], out.dt[tokens, :] = dx.astype(out.x.dtype), d_dt.astype(out.dt.dtype)
        return carry

    g, dA = jax.lax.fori_loop(0, groups, some_tokens, (scratch.g[channels], jnp.zeros_like(A)))
    scratch.g[channels] = g
    scratch.d_a[channels] += dA


def each_token(
    plan: Plan,
    A: Array,
    group: Any,
    rows: tuple[Array, Array, Array],
    gated: bool,
    carry: tuple[Array, Array],
    scratch: Scratch,
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    """(g, dA) before a group's tokens; and sum_n g B, sum_n A g a h_{t-1} and, if `gated`, the readout of each.

    `rows` are dt, dt x and dr [tokens, channels], `A` is in base 2.
    """
    dt, dx, dr = rows
    g, dA = carry
    h = scratch.states[group * TOGETHER + TOGETHER]
    inputs, steps, readout = ([dt[:1]] * TOGETHER for _ in range(3))
    tokens = plan.tokens(group)
    Bs, Cs = scratch.B[tokens], scratch.C[tokens]
    keep = None if scratch.keep is None else scratch.keep[tokens]
    for i, row in reversed(list(enumerate(plan.rows))):
        before = scratch.states[group * TOGETHER + i]
        one = slice(row, row + 1)
        B, C = over(Bs[row], plan.channels), over(Cs[row], plan.channels)
        g = g + dr[one] * C
        scratch.d_c[tokens.start + row] += by_lane(dr[one] * h)
        scratch.d_b[tokens.start + row] += by_lane(g * dx[one])
        inputs[row] = jnp.sum(g * B, axis=0, keepdims=True)
        if gated:
            readout[row] = jnp.sum(h * C, axis=0, keepdims=True)
        g = decay_of(plan, dt[one], A, keep, row) * g
        through = g * before
        steps[row] = jnp.sum(through * A, axis=0, keepdims=True)
        dA = dA + through * dt[one]
        h = before
    return (g, dA), (jnp.concatenate(inputs), jnp.concatenate(steps) / LOG2E, jnp.concatenate(readout))


def by_lane(values: Float[Array, "state channels"]) -> Float[Array, "state lanes"]:
    """Sums over every `LANES`th channel."""
    return sum(values[:, start : start + LANES] for start in range(LANES, values.shape[1], LANES)) + values[:, :LANES]


def across_lanes(sums: Any, out: Any) -> None:
    """out[state, token] = sum of sums[token, state, lane] over lanes."""
    column = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)

    def some_tokens(group: Any, found: Array) -> Array:
        for row in range(TOGETHER):
            token = group * TOGETHER + row
            found = jnp.where(column == token, jnp.sum(sums[token], axis=1, keepdims=True), found)
        return found

    out[...] = jax.lax.fori_loop(0, out.shape[1] // TOGETHER, some_tokens, jnp.zeros(out.shape, out.dtype))
