"""The selective scan on TPU: states never leave vector memory, but for one for each block of tokens.

Per token, h = exp(dt A) h + dt x B and y = sum_n C h over [state, channels], as in the definition: there is no product
for the matrix unit in it, the vector unit is the bound (Gu and Dao 2023, 2312.00752, section 3.3, keep the state on
chip in the same way). The gradient begins with the state before each block and computes the block's states again.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.selective_scan.inputs import Tokens, Weights
from pallas_kernels.selective_scan.tpu_backward import backward
from pallas_kernels.selective_scan.tpu_blocks import (
    LANES,
    LOG2E,
    ORDER,
    SUBLANES,
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

BLOCK = 128
"""Tokens of a block, at most."""
ROWS = 2**11
"""Tokens of a block times states of a channel, at most."""
STATES = 2**14
"""Numbers in the states of a block of channels, at most; in the backward pass, which has two of each, half as many."""
MOST = 256
"""States of a channel, at most."""
DTYPES = (jnp.bfloat16, jnp.float32)
NO_STEP = -1e30
"""Its softplus is 0, and the softplus' derivative too."""


def refusal(tokens: Tokens, weights: Weights) -> str | None:
    """Why these kernels cannot compute this, or None where they can."""
    for name, values in {"x": tokens.x, "dt": tokens.dt, "B": tokens.B, "C": tokens.C, "z": tokens.z}.items():
        if values is not None and values.dtype not in DTYPES:
            return f"takes bfloat16 and float32, and {name} is {values.dtype}"
    if tokens.B.shape[3] > MOST:
        return f"takes at most {MOST} states a channel, not {tokens.B.shape[3]}"
    return None


def scan(
    tokens: Tokens, weights: Weights, initial: Float[Array, "batch width state"], reverse: bool, dt_softplus: bool
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width state"]]:
    """y and the last state."""
    batch, length, width = tokens.x.shape
    plan = plan_of(tokens, reverse, dt_softplus)
    y, final = blockwise(plan, arranged(plan, tokens, weights, initial))
    each = width // plan.groups
    y = y.reshape(batch, plan.length, plan.groups, -1)[:, :length, :, :each].reshape(batch, length, width)
    final = final.reshape(batch, plan.state, plan.groups, -1)[:, : initial.shape[2], :, :each]
    return y, jnp.moveaxis(final, 1, 3).reshape(initial.shape)


def plan_of(tokens: Tokens, reverse: bool, dt_softplus: bool) -> Plan:
    """Whole tiles of states and channels, and blocks of tokens that are equal parts of the length."""
    batch, length, width = tokens.x.shape
    groups, state = tokens.B.shape[2:]
    state = -(-state // SUBLANES) * SUBLANES
    limit = max(min(BLOCK, ROWS // state), TOGETHER)
    count = -(-length // limit)
    block = -(-length // (count * TOGETHER)) * TOGETHER
    width = -(-width // (groups * LANES)) * LANES * groups
    return Plan(batch, count * block, width, groups, state, block, STATES, reverse, dt_softplus)


def arranged(plan: Plan, tokens: Tokens, weights: Weights, initial: Array) -> Operands:
    """The arrays as the kernels take them: whole blocks, absent tokens without influence, channels last."""
    x, dt, B, C, z, marks = tokens
    (batch, length, width), (groups, state) = x.shape, B.shape[2:]
    after, channels, states = plan.length - length, (plan.width - width) // groups, plan.state - state
    bias = weights.dt_bias
    if bias is not None and not plan.softplus:
        dt, bias = dt.astype(jnp.float32) + bias, None

    def present(values: Array, fill: float) -> Array:
        if marks is None:
            return values
        return jnp.where(jnp.expand_dims(marks.present, range(2, values.ndim)), values, fill)

    def wide(values: Array, fill: float = 0.0) -> Array:
        values = present(values, fill).reshape(batch, length, groups, -1)
        values = jnp.pad(values, ((0, 0), (0, after), (0, 0), (0, 0)), constant_values=fill)
        return jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, channels))).reshape(batch, plan.length, plan.width)

    def narrow(values: Array, fill: float = 0.0) -> Array:
        padding = ((0, 0), (0, 0), (0, after), (0, states))
        return jnp.pad(jnp.swapaxes(present(values, fill), 1, 2), padding, constant_values=fill)

    def by_state(values: Float[Array, "rows width state"]) -> Float[Array, "rows state width"]:
        values = jnp.moveaxis(values.astype(jnp.float32).reshape(-1, groups, width // groups, values.shape[2]), 3, 1)
        return jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, channels))).reshape(*values.shape[:2], plan.width)

    def by_channel(values: Array | None) -> Array | None:
        return None if values is None else by_state(values[None, :, None])[0]

    keep = None
    if marks is not None:
        kept = jnp.where(marks.reset, 0, 1).astype(jnp.bfloat16)
        keep = narrow(jnp.broadcast_to(kept[:, :, None, None], B.shape), 1.0)
    more = ((0, 0), (0, states), (0, 0))
    return Operands(
        *(wide(x), wide(dt, NO_STEP if plan.softplus else 0.0), narrow(B), narrow(C)),
        *(jnp.pad(by_state(weights.A[None]), more)[0], by_channel(weights.D), None if z is None else wide(z)),
        *(by_channel(bias), keep, jnp.pad(by_state(initial), more)),
    )


# ---- the gradient ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """y [batch, length, width] and the last state [batch, state, width], differentiable in every operand once."""
    return forward(plan, operands, False)[:2]


def save(plan: Plan, operands: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array | None]]:
    """The forward pass, and what the backward pass needs."""
    y, final, starts = forward(plan, operands, True)
    return (y, final), (operands, starts)


def gradients(plan: Plan, saved: tuple[Operands, Array], cotangents: tuple[Array, Array]) -> tuple[Operands]:
    """The gradient of every operand."""
    return (backward(dataclasses.replace(plan, most=plan.most // 2), *saved, *cotangents),)


blockwise.defvjp(save, gradients)


# ---- forward ---------------------------------------------------------------------------------------------------------


def forward(plan: Plan, operands: Operands, keep_starts: bool) -> tuple[Array, Array, Array | None]:
    """y, the last state, and with `keep_starts` the state before each block of tokens [batch, blocks, state, width]."""
    batch, _, times, blocks = plan.grid

    def time(t: Any) -> Any:
        return times - 1 - t if plan.reverse else t

    specs = plan.specs(time)
    starts = jax.ShapeDtypeStruct((batch, times, plan.state, plan.width), jnp.float32) if keep_starts else None
    y, final = (jax.ShapeDtypeStruct(value.shape, value.dtype) for value in (operands.x, operands.initial))
    lanes = plan.vector(plan.block, plan.state, LANES)
    return pl.pallas_call(
        functools.partial(forward_kernel, plan),
        grid=plan.grid,
        in_specs=[only(operands, specs)],
        out_specs=(specs.x, plan.at_step(times - 1, plan.state), plan.starts(time) if keep_starts else None),
        out_shape=(y, final, starts),
        scratch_shapes=[
            plan.vector(blocks, plan.state, plan.channels),
            *(lanes, lanes, None if operands.keep is None else lanes),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=ORDER, vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=plan.cost(6, 1, operands, y, starts),
        name="selective_scan_forward",
    )(operands)


def forward_kernel(
    plan: Plan, blocks: Any, y: Any, final: Any, starts: Any, states: Any, B: Any, C: Any, keep: Any
) -> None:
    """One block of tokens and channels; `states` of all the part's channels, `B`, `C` and `keep` spread over lanes."""
    time, channels = pl.program_id(2), pl.program_id(3)

    @pl.when(time == 0)
    def begin() -> None:
        states[channels] = blocks.initial[...]

    @pl.when(channels == 0)
    def spread_columns() -> None:
        spread(blocks.B, B)
        spread(blocks.C, C)
        if keep is not None:
            spread(blocks.keep, keep)

    if starts is not None:
        starts[...] = states[channels]
    A = blocks.A[...] * LOG2E

    def some_tokens(group: Any, h: Array) -> Array:
        tokens = plan.tokens(group)
        x, raw = blocks.x[tokens, :].astype(jnp.float32), raw_steps(blocks, tokens)
        dt = softplus(raw) if plan.softplus else raw
        dx = dt * x
        readout = [dx[:1]] * TOGETHER
        Bs, Cs, kept = B[tokens], C[tokens], None if keep is None else keep[tokens]
        for row in plan.rows:
            decay = decay_of(plan, dt[row : row + 1], A, kept, row)
            h = decay * h + dx[row : row + 1] * over(Bs[row], plan.channels)
            readout[row] = jnp.sum(h * over(Cs[row], plan.channels), axis=0, keepdims=True)
        result = jnp.concatenate(readout)
        if blocks.D is not None:
            result = result + blocks.D[...] * x
        if blocks.z is not None:
            result = result * jax.nn.silu(blocks.z[tokens, :].astype(jnp.float32))
        y[tokens, :] = result.astype(y.dtype)
        return h

    h = jax.lax.fori_loop(0, plan.block // TOGETHER, some_tokens, states[channels])
    states[channels] = h

    @pl.when(time == pl.num_programs(2) - 1)
    def end() -> None:
        final[...] = h
