"""The gated delta rule on TPU, backward pass: blocks from the last to the first, the state's gradient in vector memory.

A block is computed again from the state at its beginning, and its chunks then differentiated from the last to the
first; the gradients of `prepare` and `advance` are jax's own, traced into the kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.tpu_blocks import (
    PARAMETERS,
    Blocks,
    Operands,
    Tiling,
    arranged,
    cost,
    gathered,
    grid,
    laid_out,
)
from pallas_kernels.gated_delta_rule.tpu_chunk import Prepared, advance, prepare


def backward(
    tiling: Tiling,
    operands: Operands,
    starts: Float[Array, "batch blocks heads key_dim value_dim"],
    d_out: Float[Array, "batch length heads value_dim"],
    d_last: Float[Array, "batch heads key_dim value_dim"],
) -> Operands:
    """Gradients of all operands in their dtypes; those of queries and keys that heads share are summed in float32."""
    x = arranged(tiling, operands)
    d_out = laid_out(tiling, d_out)
    blocks = Blocks(tiling, lambda i: tiling.blocks - 1 - i)
    _, heads, key_dim, value_dim = x.state.shape
    dtype = x.key.dtype if tiling.shared == 1 else x.state.dtype
    keys: Any = jax.ShapeDtypeStruct((*x.key.shape[:2], heads * key_dim), dtype)
    rest: list[Any] = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in x[2:]]
    results = Operands(keys, keys, *rest)
    state = blocks.of_state(x.state)
    (found,) = pl.pallas_call(
        functools.partial(backward_kernel, tiling),
        grid=grid(tiling, x.state),
        in_specs=[blocks.of_operands(x, True), blocks.of_starts(x.state), blocks.of_tokens(value_dim), state],
        out_specs=[blocks.of_operands(x, False)],
        out_shape=[results],
        scratch_shapes=[pltpu.VMEM((tiling.heads, key_dim, value_dim), x.state.dtype)],
        compiler_params=PARAMETERS,
        cost_estimate=cost(tiling, x, 3, (x, starts, d_out, d_last, results)),
        name=f"{tiling.name}_backward",
    )(x, starts, d_out, d_last)
    return gathered(tiling, found, operands)


def backward_kernel(
    tiling: Tiling, refs: Operands, starts: Any, d_out: Any, d_last: Any, grads: Operands, d_state: Any
) -> None:
    """The chunks of one block, for all its heads."""

    @pl.when(pl.program_id(2) == 0)
    def begin() -> None:
        d_state[...] = d_last[...]

    products = functools.partial(prepare, refs.query.dtype, tiling.scale, tiling.replaces)
    chunks, pull_tokens = jax.vjp(products, tiling.tokens(refs))
    step = functools.partial(advance, refs.query.dtype)
    state, pulls = starts[...], []
    for chunk in range(tiling.chunks):
        (state, _), pull = jax.vjp(step, state, tiling.of_chunk(chunks, chunk))
        pulls.append(pull)
    d_after = d_state[...]
    d_chunks: list[Prepared] = []
    for chunk in reversed(range(tiling.chunks)):
        heads = (d_out[tiling.beside(chunk, head, state.shape[2])] for head in range(tiling.heads))
        rows = jnp.stack([x.astype(jnp.float32) for x in heads])
        d_after, d_chunk = pulls[chunk]((d_after, rows))
        d_chunks.insert(0, d_chunk)
    d_state[...] = d_after
    (d_tokens,) = pull_tokens(jax.tree.map(lambda *x: jnp.concatenate(x), *d_chunks))
    tiling.write(grads, d_tokens)

    @pl.when(pl.program_id(2) == tiling.blocks - 1)
    def end() -> None:
        grads.state[...] = d_state[...]
