"""The gated delta rule on TPU: chunks in products for the matrix unit, the state in vector memory between them.

For the gradient the forward pass also writes the state at each block's beginning, from which the backward pass computes
the block again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.tpu_backward import backward
from pallas_kernels.gated_delta_rule.tpu_blocks import (
    PARAMETERS,
    Blocks,
    Operands,
    Tiling,
    arranged,
    cost,
    grid,
    restored,
)
from pallas_kernels.gated_delta_rule.tpu_chunk import advance, prepare
from pallas_kernels.gated_linear_attention.call import Call

CHUNK, CHUNKS, HEADS = 128, 2, 4
"""Tokens of a chunk, chunks and heads of a block, where there are as many: the best of the compiler's estimates."""
DTYPES = ("bfloat16", "float32")
LANES, WIDEST = 128, 256
FORGET = -200.0
"""Stands for every log decay below it: exp of either is 0 in float32, and sums of many are still numbers."""


def refusal(call: Call) -> str | None:
    """Why this kernel cannot compute this, or None where it can."""
    dtypes = sorted({x.dtype.name for x in (call.query, call.key, call.value)})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        return f"takes query, key and value all in bfloat16 or all in float32, not {', '.join(dtypes)}"
    if not call.value.size:
        return f"takes no empty arrays, as of shape {call.value.shape}"
    dims = (call.key.shape[3], call.value.shape[3])
    if max(dims) > WIDEST:
        return f"takes heads of at most {WIDEST} dimensions, not {dims[0]} and {dims[1]}"
    heads = tile(call, True).heads
    return (
        None if heads <= 2 * HEADS else f"would need blocks of {heads} heads for whole lanes of {dims[0]} and {dims[1]}"
    )


def run(
    call: Call, beta: Float[Array, "batch length heads"]
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """The chunked form, differentiable in everything once."""
    return delta_rule(tile(call, True), operands(call, beta))


def operands(call: Call, beta: Float[Array, "batch length heads"]) -> Operands:
    """What the kernels are given: a reset is a decay that forgets all, and no decay is less than `FORGET`."""
    before = jnp.pad(call.runs, ((0, 0), (1, 0)))[:, :-1]
    decay = jnp.where((call.runs == before)[:, :, None, None], call.log_decay, FORGET)
    decay = jnp.maximum(decay if decay.shape[3] > 1 else decay[..., 0], FORGET)
    return Operands(call.query, call.key, call.value, beta.astype(call.state.dtype), decay, call.state)


def tile(call: Call, replaces: bool) -> Tiling:
    """The tiling for a call: blocks of about `HEADS` heads, whole groups or parts of one, and whole lanes."""
    (length, all_heads, value_dim), (all_groups, key_dim) = call.value.shape[1:], call.key.shape[2:]
    shared = all_heads // all_groups

    def fits(heads: int) -> bool:
        groups = max(heads // shared, 1)
        whole = all_heads % heads == 0 and (heads % shared == 0 or shared % heads == 0)
        lanes = ((heads, all_heads, value_dim), (heads, all_heads, key_dim), (groups, all_groups, key_dim))
        return whole and all(n == of or n * dim % LANES == 0 for n, of, dim in lanes)

    possible = list(filter(fits, range(1, all_heads + 1)))
    # Each of these doubles what the backward pass keeps in vector memory.
    most = HEADS >> (call.key.dtype.itemsize > 2) + (call.log_decay.shape[3] > 1) + (max(key_dim, value_dim) > LANES)
    heads = max((n for n in possible if n <= most), default=possible[0])
    chunk = min(CHUNK, max(1 << (length - 1).bit_length(), 16))
    return Tiling(call.scale, length, chunk, min(CHUNKS, -(-length // chunk)), heads, shared, replaces)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_rule(
    tiling: Tiling, operands: Operands
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """Outputs and last state, differentiable in every operand once."""
    out, last, _ = forward(tiling, operands, False)
    return out, last


def save(tiling: Tiling, operands: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array | None]]:
    """The forward pass, and what the backward pass needs."""
    out, last, starts = forward(tiling, operands, True)
    return (out, last), (operands, starts)


def gradients(tiling: Tiling, saved: tuple[Operands, Array], cotangents: tuple[Array, Array]) -> tuple[Operands]:
    """The backward pass."""
    return (backward(tiling, *saved, *cotangents),)


delta_rule.defvjp(save, gradients)


def forward(
    tiling: Tiling, operands: Operands, keep: bool
) -> tuple[
    Float[Array, "batch length heads value_dim"],
    Float[Array, "batch heads key_dim value_dim"],
    Float[Array, "batch blocks heads key_dim value_dim"] | None,
]:
    """Outputs in the dtype of value, the last state and, to `keep`, the state at the beginning of every block."""
    x = arranged(tiling, operands)
    blocks = Blocks(tiling, lambda i: i)
    out = jax.ShapeDtypeStruct(x.value.shape, x.value.dtype)
    last = jax.ShapeDtypeStruct(x.state.shape, x.state.dtype)
    batch, *shape = x.state.shape
    starts = jax.ShapeDtypeStruct((batch, tiling.blocks, *shape), x.state.dtype) if keep else None
    found = pl.pallas_call(
        functools.partial(forward_kernel, tiling),
        grid=grid(tiling, x.state),
        in_specs=[blocks.of_operands(x, True)],
        out_specs=(blocks.of_tokens(shape[2]), blocks.of_state(last), blocks.of_starts(last) if keep else None),
        out_shape=(out, last, starts),
        scratch_shapes=[pltpu.VMEM((tiling.heads, *shape[1:]), x.state.dtype)],
        compiler_params=PARAMETERS,
        cost_estimate=cost(tiling, x, 1, (x, out, last, starts)),
        name=f"{tiling.name}_forward",
    )(x)
    return restored(tiling, found[0], operands.value), found[1], found[2]


def forward_kernel(tiling: Tiling, refs: Operands, out: Any, last: Any, starts: Any, state: Any) -> None:
    """The chunks of one block, for all its heads."""

    @pl.when(pl.program_id(2) == 0)
    def begin() -> None:
        state[...] = refs.state[...]

    if starts is not None:
        starts[...] = state[...]
    chunks = functools.partial(prepare, refs.query.dtype, tiling.scale, tiling.replaces)(tiling.tokens(refs))
    step = functools.partial(advance, refs.query.dtype)
    states = state[...]
    for chunk in range(tiling.chunks):
        states, rows = step(states, tiling.of_chunk(chunks, chunk))
        for head in range(tiling.heads):
            out[tiling.beside(chunk, head, rows.shape[2])] = rows[head].astype(out.dtype)
    state[...] = states

    @pl.when(pl.program_id(2) == tiling.blocks - 1)
    def end() -> None:
        last[...] = state[...]
