"""Gated linear attention on TPU: products within chunks, the state in vector memory between them.

The grid runs over batch, blocks of heads and, innermost and in order, the chunks. With a_i and c_j the sums of decays
since the chunk's begin (`tpu_blocks.sums`), S the state at the begin, and w_j a token's gain,

    out_i = scale exp(a_i) q_i^T S + sum over j <= i of scale q_i^T k_j exp(a_i - c_j) w_j v_j
    S'    = exp(c_end) S + sum over j of exp(c_end - c_j) w_j k_j v_j^T

The heads of a group share q_i^T k_j. One decay a key dimension: `tpu_vector`. Dao and Gu 2024 (2405.21060), section 6;
Yang et al. 2023 (2312.06635).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.tpu_blocks import dot
from pallas_kernels.gated_linear_attention import tpu_vector
from pallas_kernels.gated_linear_attention.call import Call
from pallas_kernels.gated_linear_attention.tpu_backward import backward
from pallas_kernels.gated_linear_attention.tpu_blocks import (
    LANES,
    VMEM_BYTES,
    Operands,
    Tiling,
    cost,
    decays,
    per_head,
    read_sums,
    seen,
    specs,
    stacked,
    tile,
    turned,
)

CHUNK = 128


def refusal(call: Call) -> str | None:
    """Why the kernels cannot make this call, or None."""
    if call.log_decay.shape[3] > 1:
        return tpu_vector.refusal(call)
    dtype = jnp.result_type(call.query, call.key, call.value)
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32, not {dtype}"
    if call.value.shape[1] == 0:
        return "needs at least one token"
    if max(call.key.shape[3], call.value.shape[3]) > 512:
        return f"dims must be at most 512: key has shape {call.key.shape}, value {call.value.shape}"
    return None


def run(
    call: Call,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """The chunked form; the gradient keeps a state a chunk, in the dtype of the arrays, and sums are float32."""
    out, last = (scalar if call.log_decay.shape[3] == 1 else tpu_vector.run)(call)
    return (out if call.bonus is None else out + own(call, call.bonus)), last


def scalar(
    call: Call,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """One decay a head, without what tokens read of themselves by the bonus."""
    batch, length, heads, value_dim = call.value.shape
    key_dim = call.key.shape[3]
    tiling = tile(call, CHUNK)
    begun = jnp.pad(call.runs, ((0, 0), (1, -length % tiling.chunk)), mode="edge").at[:, 0].set(0)
    reset = (jnp.diff(begun, axis=1) > 0).reshape(batch, -1, 1, 1, tiling.chunk)
    out, last = scan(tiling, operands_of(call, tiling), reset)
    out = out.reshape(batch, -1, heads, tiling.value_dim)[:, :length, :, :value_dim]
    last = last.reshape(batch, heads, tiling.value_dim, -1)[:, :, :value_dim, :key_dim]
    return out, jnp.swapaxes(last, 2, 3)


def operands_of(call: Call, tiling: Tiling) -> Operands:
    """The arrays of a call as the kernels take them."""
    batch, length, heads, value_dim = call.value.shape
    groups, key_dim = call.key.shape[2:]
    key_lanes = key_dim if groups == 1 else -(-key_dim // LANES) * LANES
    dtype, absent = jnp.result_type(call.query, call.key, call.value), -length % tiling.chunk

    def side_by_side(x: Array, lanes: int) -> Array:
        x = jnp.pad(x.astype(dtype), ((0, 0), (0, absent), (0, 0), (0, lanes - x.shape[3])))
        return x.reshape(batch, x.shape[1], -1)

    def rows(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, absent), (0, 0)))
        return x.reshape(batch, -1, tiling.chunk, heads // tiling.heads, tiling.heads).transpose(0, 1, 3, 4, 2)

    short = ((0, 0), (0, 0), (0, tiling.value_dim - value_dim), (0, key_lanes - key_dim))
    return Operands(
        side_by_side(call.query, key_lanes),
        side_by_side(call.key, key_lanes),
        side_by_side(call.value, tiling.value_dim),
        rows(call.log_decay[..., 0]),
        None if call.gain is None else rows(call.gain),
        jnp.pad(jnp.swapaxes(call.state, 2, 3), short).reshape(batch, -1, key_lanes),
    )


def own(call: Call, bonus: Float[Array, "heads key_dim"]) -> Float[Array, "batch length heads value_dim"]:
    """scale q_t^T diag(bonus) k_t v_t: what a token reads of itself where it reads the state before it."""
    heads, wide = call.value.shape[2], call.state.dtype
    query, key = (jnp.repeat(x.astype(wide), heads // x.shape[2], axis=2) for x in (call.query, call.key))
    weight = call.scale * jnp.sum(query * bonus * key, axis=-1)
    return (weight if call.gain is None else weight * call.gain)[..., None] * call.value.astype(wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    tiling: Tiling, operands: Operands, reset: Bool[Array, "batch chunks 1 1 chunk"]
) -> tuple[Float[Array, "batch length head_values"], Float[Array, "batch head_values key_dim"]]:
    """Outputs and the last state, differentiable in every operand once."""
    return forward(tiling, operands, reset, keep=False)[:2]


def save(tiling: Tiling, operands: Operands, reset: Array) -> tuple[tuple[Array, Array], tuple]:
    """The forward pass, and what the backward pass needs: the state at every chunk's begin."""
    out, last, states = forward(tiling, operands, reset, keep=True)
    return (out, last), (operands, reset, states)


def gradients(tiling: Tiling, saved: tuple, cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    """The backward pass."""
    operands, reset, states = saved
    return backward(tiling, operands, reset, states, *cotangents), None


scan.defvjp(save, gradients)


def forward(
    tiling: Tiling, operands: Operands, reset: Bool[Array, "batch chunks 1 1 chunk"], keep: bool
) -> tuple[Float[Array, "batch length head_values"], Float[Array, "batch head_values key_dim"], Array | None]:
    """Outputs, the last state and, to `keep`, the states at the begins of all chunks."""
    query, value, state = operands.query, operands.value, operands.state
    rows = stacked(tiling, operands, reset)
    batch, chunks, blocks = rows.shape[:3]
    spec = specs(tiling, operands, lambda c: c)
    states = jax.ShapeDtypeStruct((batch, chunks, *state.shape[1:]), value.dtype)
    out = pl.pallas_call(
        functools.partial(forward_kernel, tiling, operands.gain is not None),
        grid=(batch, blocks, chunks),
        in_specs=[spec.key, spec.key, spec.value, spec.rows(rows.shape[3]), spec.state],
        out_specs=[spec.value, spec.state, *([spec.states] * keep)],
        out_shape=[
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
            *([states] * keep),
        ],
        scratch_shapes=[pltpu.VMEM((tiling.width, state.shape[2]), state.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost(tiling, operands, (query, query, value, value, rows, *([states] * keep)), 1),
        name="gated_linear_attention_forward",
    )(query, operands.key, value, rows, state)
    return out[0], out[1], out[2] if keep else None


def forward_kernel(
    tiling: Tiling,
    gained: bool,
    query: Any,
    key: Any,
    value: Any,
    rows: Any,
    first: Any,
    out: Any,
    last: Any,
    *rest: Any,
) -> None:
    """One chunk of a block of heads. `rest`: where the state before it is kept, if it is, and the state."""
    *kept, state = rest

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
        state[...] = first[...]

    for states in kept:
        states[...] = state[...].astype(states.dtype)
    found = read_sums(tiling, rows[...], gained)
    q, k = query[...], key[...]
    products = jnp.where(seen(tiling, tiling.exclusive), dot(k, q, (1, 1)) * tiling.scale, 0)
    values = turned(value[...])
    values = values if found.gain is None else per_head(tiling, values, found.gain)
    written = dot(per_head(tiling, values, found.tail).astype(q.dtype), k, (1, 0))
    reads = per_head(tiling, dot(state[...].astype(q.dtype), q, (1, 1)), found.read)
    outs = []
    for head in range(tiling.heads):
        weights = (products * decays(tiling, found, head)).astype(q.dtype)
        outs.append(dot(values[tiling.of(head)].astype(q.dtype), weights, (1, 0)) + reads[tiling.of(head)])
    state[...] = per_head(tiling, state[...], found.kept) + written
    out[...] = jnp.concatenate(outs).astype(out.dtype).T

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def end() -> None:
        last[...] = state[...]
