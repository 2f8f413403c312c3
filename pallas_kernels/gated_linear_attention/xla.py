"""Gated linear attention in plain XLA: products within chunks of tokens, a loop that carries the state between them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_linear_attention.call import Call, with_gained_values
from pallas_kernels.gated_linear_attention.spans import after, between, decayed_products, up_to

State = Float[Array, "batch groups repeats key_dim value_dim"]
Rows = Float[Array, "batch groups repeats chunk dim"]
"""The tokens of a chunk; `repeats` is 1 where all heads of a group share an array."""


def refusal(call: Call) -> str | None:
    """Nothing."""
    return None


def run(
    call: Call,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """The chunked form: O(chunk + key_dim) value_dim operations a token and head; the gradient keeps a state a chunk.

    Yang et al. 2023 (2312.06635), Dao and Gu 2024 (2405.21060). The heads of a group share the products of its queries
    and keys where the decay is a scalar.
    """
    call = with_gained_values(call)
    bonus = call.bonus
    if bonus is not None:
        bonus = bonus.astype(call.state.dtype).reshape(call.key.shape[2], -1, 1, bonus.shape[1])

    def step(state: State, chunk: tuple[Array, ...]) -> tuple[State, Rows]:
        return chunk_step(state, *chunk, scale=call.scale, bonus=bonus)

    return over_chunks(step, call, (call.query, call.key, call.value, call.log_decay))


def chunk_step(
    state: State,
    query: Rows,
    key: Rows,
    value: Rows,
    decay: Rows,
    runs: Int[Array, "batch chunk"],
    *,
    scale: float,
    bonus: Float[Array, "groups repeats 1 key_dim"] | None = None,
) -> tuple[State, Rows]:
    """The state after a chunk and the output of its tokens. Run 0 is the one that the state belongs to."""
    exclusive = bonus is not None
    query = query * scale
    out = within(query, key, decay, runs, exclusive) @ value + from_state(query, decay, runs, state, exclusive)
    if bonus is not None:
        out = out + jnp.sum(query * bonus * key, axis=-1, keepdims=True) * value
    runs = runs[:, None, None, :, None]
    last = runs[..., -1:, :]
    written = jnp.swapaxes(jnp.where(runs == last, key * jnp.exp(after(decay)), 0), -1, -2) @ value
    kept = jnp.exp(jnp.sum(decay, axis=-2))[..., None] * state
    return jnp.where(last == 0, kept, 0) + written, out


def within(
    query: Rows, key: Rows, decay: Rows, runs: Int[Array, "batch chunk"], exclusive: bool
) -> Float[Array, "batch groups repeats chunk chunk"]:
    """[i, j]: q_i^T diag(exp(sum of decay after j up to i)) k_j for j <= i of the same run.

    Exclusive: for j < i, up to before i.
    """
    if decay.shape[-1] == 1:
        products = (query @ jnp.swapaxes(key, -1, -2)) * jnp.exp(between(decay[..., 0], exclusive))
    else:
        products = decayed_products(query, key, decay, exclusive)
    index = jnp.arange(runs.shape[1])
    seen = index[:, None] > index if exclusive else index[:, None] >= index
    seen = seen & (runs[:, :, None] == runs[:, None, :])
    return jnp.where(seen[:, None, None], products, 0)


def from_state(rows: Rows, decay: Rows, runs: Int[Array, "batch chunk"], state: State, exclusive: bool = False) -> Rows:
    """S^T diag(exp(sum of decay up to i, or before i)) x_i, for tokens of the run that the state belongs to."""
    read = (rows * jnp.exp(up_to(decay, exclusive))) @ state
    return jnp.where(runs[:, None, None, :, None] == 0, read, 0)


def over_chunks(
    step: Callable[[State, tuple[Array, ...]], tuple[State, Rows]], call: Call, arrays: tuple[Array, ...]
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """Run `step(state, chunk)` over the chunks of `arrays` [batch, length, heads, dim] and of the runs.

    What a step computes is computed again for the gradient. A length that is no multiple of the chunk is filled up with
    zeros, which are absent tokens.
    """
    batch, length, heads, value_dim = call.value.shape
    groups, wide = call.key.shape[2], call.state.dtype
    size = min(call.chunk, 1 << max(length - 1, 0).bit_length())
    runs = jnp.pad(call.runs, ((0, 0), (0, -length % size)), mode="edge").reshape(batch, -1, size)
    begin = jnp.pad(runs[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    chunks = (*(split(x, groups, size) for x in arrays), jnp.moveaxis(runs - begin, 1, 0))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def widened(state: State, chunk: tuple[Array, ...]) -> tuple[State, Rows]:
        *tokens, runs = chunk
        state, out = step(state, (*(x.astype(wide) for x in tokens), runs))
        return state, out.astype(call.value.dtype)

    state = call.state.reshape(batch, groups, heads // groups, *call.state.shape[2:])
    state, out = jax.lax.scan(widened, state, chunks)
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, value_dim)[:, :length]
    return out, state.reshape(call.state.shape)


def split(
    x: Float[Array, "batch length heads dim"], groups: int, size: int
) -> Float[Array, "chunks batch groups repeats size dim"]:
    """The chunks of an array, the last one filled up with zeros."""
    batch, length, _, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    return x.reshape(batch, -1, size, groups, x.shape[2] // groups, dim).transpose(1, 0, 3, 4, 2, 5)
