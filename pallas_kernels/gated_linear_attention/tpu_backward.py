"""Gated linear attention on TPU, backward pass: chunks from the last to the first, the state's gradient in between.

With M_ij = p_ij e_ij w_j, where p_ij = scale q_i^T k_j, e_ij = exp(a_i - c_j), r_i = scale exp(a_i), t_j = exp(c_end -
c_j), S the state at the chunk's begin (kept by the forward pass) and G the gradient of that at its end:

    d_v_j = w_j u_j,  u_j = sum_i p_ij e_ij d_out_i + t_j G^T k_j,   d_w_j = v_j . u_j
    d_p_ij = e_ij w_j d_out_i . v_j,  d_q = scale d_p k + r_i S d_out_i,  d_k = scale d_p^T q + t_j w_j G v_j
    d_S = exp(c_end) G + sum_i r_i q_i d_out_i^T

A decay is part of the exponents between the tokens on both its sides, of reads after it, of writes before it and of
the chunk's own: the kernel makes their sums a token, so that no sum runs over more than a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.tpu_blocks import dot
from pallas_kernels.gated_linear_attention.tpu_blocks import (
    VMEM_BYTES,
    Operands,
    Tiling,
    cost,
    decays,
    over_rows,
    per_head,
    read_sums,
    seen,
    specs,
    stacked,
    turned,
)


def backward(
    tiling: Tiling,
    operands: Operands,
    reset: Bool[Array, "batch chunks 1 1 chunk"],
    states: Float[Array, "batch chunks head_values key_dim"],
    d_out: Float[Array, "batch length head_values"],
    d_last: Float[Array, "batch head_values key_dim"],
) -> Operands:
    """The gradients of all operands, in their dtypes; sums over heads and tokens are float32."""
    query, key, value, _, gain, state = operands
    rows = stacked(tiling, operands, reset)
    batch, chunks, blocks = rows.shape[:3]
    spec = specs(tiling, operands, lambda c: chunks - 1 - c)
    key_dim = state.shape[2]
    row_shape = (*rows.shape[:3], (3 if gain is None else 4) * tiling.heads, tiling.chunk)
    part = pl.BlockSpec((None, None, tiling.chunk, key_dim), lambda b, n, c: (b, n, chunks - 1 - c, 0))
    parts = jax.ShapeDtypeStruct((batch, blocks, query.shape[1], key_dim), state.dtype)
    arrays = (query, key, value, value, value, rows, states, parts, parts)
    d_query, d_key, d_value, d_rows, d_state = pl.pallas_call(
        functools.partial(backward_kernel, tiling, gain is not None),
        grid=(batch, blocks, chunks),
        in_specs=[spec.key, spec.key, spec.value, spec.rows(rows.shape[3]), spec.states, spec.value, spec.state],
        out_specs=[part, part, spec.value, spec.rows(row_shape[3]), spec.state],
        out_shape=[
            parts,
            parts,
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct(row_shape, state.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ],
        scratch_shapes=[pltpu.VMEM((tiling.width, key_dim), state.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost(tiling, operands, arrays, 3),
        name="gated_linear_attention_backward",
    )(query, key, value, rows, states, d_out, d_last)
    late, early, written, *d_gain = jnp.split(d_rows, row_shape[3] // tiling.heads, axis=3)
    d_decay = jnp.where(reset, 0, decay_gradient(late, early, written, tiling.exclusive))
    return Operands(
        of_groups(tiling, d_query).astype(query.dtype),
        of_groups(tiling, d_key).astype(key.dtype),
        d_value,
        d_decay,
        d_gain[0] if d_gain else None,
        d_state,
    )


def of_groups(
    tiling: Tiling, parts: Float[Array, "batch blocks length key_dim"]
) -> Float[Array, "batch length head_values"]:
    """The sums over the blocks of every group, side by side."""
    batch, _, length, key_dim = parts.shape
    total = jnp.sum(parts.reshape(batch, tiling.groups, -1, length, key_dim), axis=2)
    return jnp.moveaxis(total, 1, 2).reshape(batch, length, -1)


def decay_gradient(
    late: Float[Array, "... chunk"],
    early: Float[Array, "... chunk"],
    written: Float[Array, "... chunk"],
    exclusive: bool,
) -> Float[Array, "... chunk"]:
    """For each token l: late_i of readers i >= l (i > l if `exclusive`) less early_j of j >= l, and written_j of j < l.

    Pairs on the same side of l are in both of the first two sums. The last entry of `written` is the chunk's own.
    """
    own = written[..., -1:]
    if exclusive:
        late = jnp.concatenate([late[..., 1:], jnp.zeros_like(own)], axis=-1)
    ones = jnp.tril(jnp.ones((late.shape[-1],) * 2, late.dtype))
    after = jnp.matmul(late - early, ones, precision=lax.Precision.HIGHEST)
    before = jnp.matmul(written, jnp.triu(ones.T, 1), precision=lax.Precision.HIGHEST)
    return after + before + own


def backward_kernel(tiling: Tiling, gained: bool, *refs: Any) -> None:
    """One chunk of a block of heads; `d_state` is G, then d_S."""
    query, key, value, rows, states, d_out, d_last, d_query, d_key, d_value, d_rows, d_first, d_state = refs

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
        d_state[...] = d_last[...]

    found = read_sums(tiling, rows[...], gained)
    q, k, dtype = query[...], key[...], query.dtype
    before, after = states[...], d_state[...].astype(dtype)
    plain, d_outs = turned(value[...]), turned(d_out[...])
    values = plain if found.gain is None else per_head(tiling, plain, found.gain)
    d_reads = per_head(tiling, d_outs, found.read)
    reads = d_reads * dot(before, q, (1, 1))
    sent = per_head(tiling, dot(after, k, (1, 1)), found.tail)
    tails = per_head(tiling, values, found.tail).astype(dtype)

    products = dot(k, q, (1, 1)) * tiling.scale
    strict = jnp.where(seen(tiling, True), products, 0)
    products = strict if tiling.exclusive else jnp.where(seen(tiling, False), products, 0)
    d_products = jnp.zeros_like(products)
    column = lax.broadcasted_iota(jnp.int32, (tiling.chunk, tiling.heads), 1)
    early = jnp.zeros(column.shape, products.dtype)
    late, written, d_values, d_gain = [], [], [], []
    for head in range(tiling.heads):
        this, of = slice(head, head + 1), tiling.of(head)
        weights = decays(tiling, found, head)
        d_out_of = d_outs[of].astype(dtype)
        d_weighted = dot(values[of].astype(dtype), d_out_of, (0, 0)) * weights
        d_products += d_weighted
        exponents = d_weighted * strict
        early = jnp.where(column == head, jnp.sum(exponents, axis=1, keepdims=True), early)
        late.append(over_rows(exponents) + over_rows(reads[of]))
        d_v = dot(d_out_of, (weights * products).astype(dtype), (1, 1)) + sent[of]
        own = found.kept[this] * jnp.sum(over_rows(states[of] * d_state[of]), axis=1, keepdims=True)
        written.append(jnp.concatenate([over_rows(values[of] * sent[of])[:, :-1], own], axis=1))
        if gained:
            d_gain.append(over_rows(plain[of] * d_v))
        d_values.append(d_v)
        d_state[of] = found.kept[this] * d_state[of] + dot(d_reads[of].astype(dtype), q, (1, 0))
    d_written = jnp.concatenate(d_values)
    d_written = d_written if found.gain is None else per_head(tiling, d_written, found.gain)
    d_value[...] = d_written.astype(d_value.dtype).T
    d_rows[...] = jnp.concatenate([*late, early.T, *written, *d_gain])
    d_products = (d_products * jnp.where(seen(tiling, tiling.exclusive), tiling.scale, 0)).astype(dtype)
    d_query[...] = dot(d_reads.astype(dtype), before, (0, 0)) + dot(d_products, k, (0, 0))
    d_key[...] = dot(tails, after, (0, 0)) + dot(d_products, q, (1, 0))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def end() -> None:
        d_first[...] = d_state[...]
