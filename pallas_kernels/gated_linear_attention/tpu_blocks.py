"""What the TPU's two kernels of gated linear attention share: how tokens and heads are cut, and sums of decays.

In memory heads lie side by side, as a model's arrays have them; heads of one group share queries and keys, so one
product with their states or values serves them all. The kernels turn what is `[tokens, heads]` in memory: with tokens
in the lanes, a number a token and head is a row, which costs nothing to apply to all of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.tpu_blocks import LANES
from pallas_kernels.gated_linear_attention.call import Call

FORGET = 104.0
"""exp(-FORGET) is 0 in float32: a stronger decay, and a reset, forget no more than this one."""
VMEM_BYTES = 28 * 2**20
"""What a kernel may take of a core's vector memory."""
WIDEST = 2560
"""Numbers of a token in a block of heads: of bfloat16, with at most 128 key dims; fewer of more bytes."""


@dataclass(frozen=True)
class Tiling:
    """The static half of a call."""

    chunk: int
    """tokens of a block, a multiple of 16 and at most 2^16"""
    heads: int
    """heads of a block, all of one group"""
    value_dim: int
    """a multiple of 16"""
    groups: int
    exclusive: bool
    """a token reads the state before its own decay and write"""
    exact: bool
    """sums of decays are kept in two parts"""
    scale: float

    @property
    def width(self) -> int:
        """Numbers of a token in a block of heads, a multiple of 128."""
        return self.heads * self.value_dim

    def of(self, head: int) -> slice:
        """The rows of a head."""
        return slice(head * self.value_dim, (head + 1) * self.value_dim)


def tile(call: Call, chunk: int) -> Tiling:
    """The tiling of a call; a head is as wide as makes the heads of a group fill whole lanes."""
    length, heads, value_dim = call.value.shape[1:]
    groups, key_dim = call.key.shape[2:]
    itemsize = jnp.result_type(call.query, call.key, call.value).itemsize
    shared = heads // groups
    multiple = max(16, LANES // (shared & -shared))
    wide = -(-value_dim // multiple) * multiple
    fitting = [n for n in range(1, shared + 1) if shared % n == 0 and n * wide % LANES == 0]
    most = WIDEST * 2 * LANES // (itemsize * max(key_dim, LANES))
    block = max((n for n in fitting if n * wide <= most), default=fitting[0])
    tokens = min(chunk, -(-length // 16) * 16)
    return Tiling(tokens, block, wide, groups, call.bonus is not None, itemsize > 2, call.scale)


# ---- arrays as kernels take them -------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """What gradients flow to: heads side by side, lengths whole chunks."""

    query: Float[Array, "batch length group_keys"]
    key: Float[Array, "batch length group_keys"]
    value: Float[Array, "batch length head_values"]
    decay: Float[Array, "batch chunks blocks heads chunk"]
    gain: Float[Array, "batch chunks blocks heads chunk"] | None
    state: Float[Array, "batch head_values key_dim"]


def stacked(
    tiling: Tiling, operands: Operands, reset: Bool[Array, "batch chunks 1 1 chunk"]
) -> Float[Array, "batch chunks blocks rows chunk"]:
    """The sums of decays and the gain."""
    gain = [] if operands.gain is None else [operands.gain]
    return jnp.concatenate([*sums(tiling, operands.decay, reset), *gain], axis=3)


class Specs(NamedTuple):
    """The blocks of a grid over (batch, blocks of heads, chunks)."""

    key: pl.BlockSpec
    value: pl.BlockSpec
    rows: Callable[[int], pl.BlockSpec]
    """of the number of rows"""
    state: pl.BlockSpec
    states: pl.BlockSpec


def specs(tiling: Tiling, operands: Operands, at: Callable[[Any], Any]) -> Specs:
    """`at` gives the chunk of a step."""
    key_dim, chunk = operands.state.shape[2], tiling.chunk
    blocks_of_group = operands.value.shape[2] // tiling.width // tiling.groups

    def key_at(b: Any, n: Any, c: Any) -> tuple[Any, Any, Any]:
        return b, at(c), lax.div(n, jnp.int32(blocks_of_group))

    return Specs(
        pl.BlockSpec((None, chunk, key_dim), key_at),
        pl.BlockSpec((None, chunk, tiling.width), lambda b, n, c: (b, at(c), n)),
        lambda rows: pl.BlockSpec((None, None, None, rows, chunk), lambda b, n, c: (b, at(c), n, 0, 0)),
        pl.BlockSpec((None, tiling.width, key_dim), lambda b, n, c: (b, n, 0)),
        pl.BlockSpec((None, None, tiling.width, key_dim), lambda b, n, c: (b, at(c), n, 0)),
    )


def cost(tiling: Tiling, operands: Operands, arrays: tuple[Any, ...], passes: int) -> pl.CostEstimate:
    """What the compiler's scheduler is told; `passes`: how often the forward pass's products are made."""
    (batch, length, values), key_dim = operands.value.shape, operands.state.shape[2]
    shared = values // tiling.width * tiling.chunk * key_dim
    return pl.CostEstimate(
        flops=2 * passes * batch * length * (values * (tiling.chunk + 2 * key_dim) + shared),
        transcendentals=batch * length * values // tiling.value_dim * tiling.chunk,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )


# ---- sums of decays --------------------------------------------------------------------------------------------------


def sums(
    tiling: Tiling, decay: Float[Array, "... heads chunk"], reset: Bool[Array, "... 1 chunk"]
) -> list[Float[Array, "... heads chunk"]]:
    """Sums of decays since the chunk's begin: up to every token and, where that is another, as a query reads it.

    A reset stands for the strongest decay. Exact sums have a coarse and a fine part: the coarse ones are multiples of a
    power of two so large that float32 holds them exactly, and a difference of two sums is off by 1e-8 at most, however
    strong the decays. Otherwise it may be off by 1e-3, a quarter of what rounding to bfloat16 does.
    """
    decay = jnp.where(reset, -FORGET, jnp.maximum(decay, -FORGET))
    parts = [decay]
    if tiling.exact:
        steps = 2.0 ** (17 - math.ceil(math.log2(tiling.chunk)))
        coarse = jnp.round(decay * steps) / steps
        parts = [coarse, decay - coarse]
    # Products are made in three parts of 8 bits, which ones do not round.
    ones = jnp.triu(jnp.ones((tiling.chunk, tiling.chunk), decay.dtype))
    keys = [jnp.matmul(part, ones, precision=lax.Precision.HIGHEST) for part in parts]
    if not tiling.exclusive:
        return keys
    before, *fine = [key - part for key, part in zip(keys, parts)]
    return [*keys, before - jnp.where(reset, FORGET, 0), *fine]


class Sums(NamedTuple):
    """What a kernel makes of the sums of a chunk: rows [heads, chunk], columns [chunk, parts * heads]."""

    query_rows: list[Float[Array, "heads chunk"]]
    key_columns: Float[Array, "chunk columns"]
    read: Float[Array, "heads chunk"]
    """scale times the decay from the chunk's begin up to a token"""
    tail: Float[Array, "heads chunk"]
    """the decay from a token to the chunk's end"""
    kept: Float[Array, "heads 1"]
    """the decay of the whole chunk"""
    gain: Float[Array, "heads chunk"] | None


def read_sums(tiling: Tiling, rows: Float[Array, "rows chunk"], gained: bool) -> Sums:
    """From `stacked`."""
    heads, parts = tiling.heads, 1 + tiling.exact
    found = [rows[i * heads : (i + 1) * heads] for i in range(rows.shape[0] // heads)]
    gain = found.pop() if gained else None
    keys, queries = found[:parts], found[-parts:]
    tail = sum(x[:, -1:] - x for x in keys)
    kept = sum(x[:, -1:] for x in keys)
    read = tiling.scale * jnp.exp(sum(queries))
    return Sums(queries, rows[: parts * heads].T, read, jnp.exp(tail), jnp.exp(kept), gain)


def decays(tiling: Tiling, found: Sums, head: int) -> Float[Array, "chunk chunk"]:
    """[j, i]: exp of the decay between token j and its reader i; 1 where i is before j."""
    places = [part * tiling.heads + head for part in range(len(found.query_rows))]
    between = sum(
        row[head : head + 1] - found.key_columns[:, place : place + 1]
        for row, place in zip(found.query_rows, places, strict=True)
    )
    return jnp.exp(jnp.minimum(between, 0))


def seen(tiling: Tiling, strict: bool) -> Bool[Array, "chunk chunk"]:
    """Which readers (columns) come after a token (rows), or are the token itself unless `strict`."""
    token, reader = (lax.broadcasted_iota(jnp.int32, (tiling.chunk, tiling.chunk), axis) for axis in (0, 1))
    return token < reader if strict else token <= reader


# ---- blocks with tokens in the lanes ---------------------------------------------------------------------------------


def turned(x: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """The transpose, float32."""
    return x.T.astype(jnp.float32)


def per_head(
    tiling: Tiling, x: Float[Array, "width columns"], rows: Float[Array, "heads #columns"]
) -> Float[Array, "width columns"]:
    """Each head times its row."""
    return jnp.concatenate([x[tiling.of(head)] * rows[head : head + 1] for head in range(tiling.heads)])


def over_rows(x: Float[Array, "rows chunk"]) -> Float[Array, "1 chunk"]:
    """The sum of the rows."""
    return jnp.sum(x, axis=0, keepdims=True)
