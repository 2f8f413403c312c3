"""What the TPU's two kernels of the gated delta rule share: how the arrays lie, and which block a step works on.

Both grids run over batch, heads and, innermost, blocks of tokens, which are several chunks each; the blocks of one step
hold several heads, whose chains of products are independent of each other and fill the matrix units together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.tpu_chunk import Prepared, Tokens

VMEM_BYTES = 32 * 2**20
"""What a kernel may take of a core's vector memory: v5p and tpu7x have 64 MiB, v5e and v6e 128."""


class Operands(NamedTuple):
    """What gradients flow to; decays are finite."""

    query: Float[Array, "batch length groups key_dim"]
    key: Float[Array, "batch length groups key_dim"]
    value: Float[Array, "batch length heads value_dim"]
    beta: Float[Array, "batch length heads"]
    log_decay: Float[Array, "batch length heads"] | Float[Array, "batch length heads key_dim"]
    state: Float[Array, "batch heads key_dim value_dim"]


@dataclass(frozen=True)
class Tiling:
    """The static half of a call."""

    scale: float
    length: int
    chunk: int
    chunks: int
    """of a block"""
    heads: int
    """of a block: a multiple or a divisor of `shared`"""
    shared: int
    """heads that share a query and a key"""
    replaces: bool
    """a token's value replaces what its key reads; else it is added, beta times (gated linear attention)"""

    @property
    def name(self) -> str:
        """What the kernels compute."""
        return "gated_delta_rule" if self.replaces else "gated_linear_attention"

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.chunk * self.chunks

    @property
    def blocks(self) -> int:
        """Blocks of tokens; the last one is filled up with absent ones."""
        return -(-self.length // self.block)

    @property
    def groups(self) -> int:
        """Queries and keys of a block."""
        return max(self.heads // self.shared, 1)

    def tokens(self, refs: Operands) -> Tokens:
        """The tokens of a block in float32, [chunks * heads, ...]."""
        group = [head * self.groups // self.heads for head in range(self.heads)]
        found = [
            Tokens(*(ref[place].astype(jnp.float32) for ref, place in zip(refs, self.places(refs, group, head, chunk))))
            for chunk in range(self.chunks)
            for head in range(self.heads)
        ]
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    def write(self, refs: Operands, tokens: Tokens) -> None:
        """The inverse, into arrays that have queries and keys for every head."""
        for chunk in range(self.chunks):
            for head in range(self.heads):
                for ref, place, x in zip(refs, self.places(refs, list(range(self.heads)), head, chunk), tokens):
                    ref[place] = x[chunk * self.heads + head].astype(ref.dtype)

    def of_chunk(self, x: Prepared, chunk: int) -> Prepared:
        """All heads of a chunk, of arrays [chunks * heads, ...]."""
        return jax.tree.map(lambda y: y[chunk * self.heads : (chunk + 1) * self.heads], x)

    def places(self, refs: Operands, group: list[int], head: int, chunk: int) -> tuple[Any, ...]:
        """Where a chunk's tokens lie in a block of each array, for a head that uses queries and keys of a group."""
        key_dim, value_dim = refs.state.shape[1:]
        key, row = self.beside(chunk, group[head], key_dim), (slice(head, head + 1), self.part(chunk))
        decay = row if refs.log_decay.shape == refs.beta.shape else self.beside(chunk, head, key_dim)
        return key, key, self.beside(chunk, head, value_dim), row, decay

    def beside(self, chunk: int, head: int, dim: int) -> tuple[slice, slice]:
        """Where a chunk of a head lies in a block of an array [length, heads * dim]."""
        return self.part(chunk), slice(head * dim, (head + 1) * dim)

    def part(self, chunk: int) -> slice:
        """The tokens of a chunk of a block."""
        return slice(chunk * self.chunk, (chunk + 1) * self.chunk)


def laid_out(tiling: Tiling, x: Array) -> Array:
    """[batch, length, heads, dim] -> [batch, length, heads * dim]; numbers of heads by blocks as rows of tokens.

    [batch, length, heads] -> [batch, blocks, blocks of heads, heads, block]. The length is filled up with zeros.
    """
    x = jnp.pad(x, ((0, 0), (0, -tiling.length % tiling.block), *((0, 0),) * (x.ndim - 2)))
    if x.ndim == 4:
        return x.reshape(*x.shape[:2], -1)
    return x.reshape(x.shape[0], tiling.blocks, tiling.block, -1, tiling.heads).transpose(0, 1, 3, 4, 2)


def arranged(tiling: Tiling, operands: Operands) -> Operands:
    """All operands as the kernels take them."""
    return Operands(*[laid_out(tiling, x) for x in operands[:5]] + [operands.state])


def gathered(tiling: Tiling, x: Operands, like: Operands) -> Operands:
    """Back from `arranged`."""
    return Operands(*[restored(tiling, *pair) for pair in zip(x[:5], like)] + [x.state])


def restored(tiling: Tiling, x: Array, like: Array) -> Array:
    """Back from `laid_out` to the shape and dtype of `like`; heads that share an array are summed."""
    if like.ndim == 3:
        x = x.transpose(0, 1, 4, 2, 3)
        return x.reshape(x.shape[0], -1, like.shape[2])[:, : tiling.length].astype(like.dtype)
    x = x[:, : tiling.length].reshape(*like.shape[:3], -1, like.shape[3])
    return (x[:, :, :, 0] if x.shape[3] == 1 else jnp.sum(x, axis=3)).astype(like.dtype)


class Blocks(NamedTuple):
    """The blocks of arrays that a step of the grid works on."""

    tiling: Tiling
    at: Callable[[Any], Any]
    """the block of tokens of a step"""

    def of_tokens(self, dim: int) -> pl.BlockSpec:
        """Of an array [batch, length, heads * dim]."""
        return pl.BlockSpec((None, self.tiling.block, self.tiling.heads * dim), lambda b, h, i: (b, self.at(i), h))

    def of_groups(self, dim: int) -> pl.BlockSpec:
        """Of queries or keys."""
        tiling = self.tiling
        turns = tiling.shared * tiling.groups // tiling.heads
        shape = (None, tiling.block, tiling.groups * dim)
        return pl.BlockSpec(shape, lambda b, h, i: (b, self.at(i), jax.lax.div(h, jnp.int32(turns))))

    def of_rows(self) -> pl.BlockSpec:
        """Of one number a head and token."""
        shape = (None, None, None, self.tiling.heads, self.tiling.block)
        return pl.BlockSpec(shape, lambda b, h, i: (b, self.at(i), h, 0, 0))

    def of_state(self, state: Any) -> pl.BlockSpec:
        """Of the first or the last state."""
        return pl.BlockSpec((None, self.tiling.heads, *state.shape[2:]), lambda b, h, i: (b, h, 0, 0))

    def of_starts(self, state: Any) -> pl.BlockSpec:
        """Of the states at the blocks' beginnings, [batch, blocks, heads, key_dim, value_dim]."""
        shape = (None, None, self.tiling.heads, *state.shape[2:])
        return pl.BlockSpec(shape, lambda b, h, i: (b, self.at(i), h, 0, 0))

    def of_operands(self, x: Operands, grouped: bool) -> Operands:
        """Of all of them; queries and keys `grouped` or one for each head."""
        key_dim, value_dim = x.state.shape[2:]
        keys = self.of_groups(key_dim) if grouped else self.of_tokens(key_dim)
        decay = self.of_rows() if x.log_decay.ndim == 5 else self.of_tokens(key_dim)
        specs: list[Any] = [keys, keys, self.of_tokens(value_dim), self.of_rows(), decay, self.of_state(x.state)]
        return Operands(*specs)


def grid(tiling: Tiling, state: Array) -> tuple[int, int, int]:
    """Batch, blocks of heads, blocks of tokens."""
    return state.shape[0], state.shape[1] // tiling.heads, tiling.blocks


PARAMETERS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
)


def cost(tiling: Tiling, operands: Operands, passes: int, arrays: Any) -> pl.CostEstimate:
    """What the compiler's scheduler is told: `passes` times the products of a forward pass, arrays once.

    Of a chunk that replaces: two products of keys, the doublings of the inverse, two products with squares and three
    with the state; one, one and two if it adds. Where each key dimension decays on its own, products of keys are made
    for each doubling.
    """
    batch, heads, key_dim, value_dim = operands.state.shape
    levels = tiling.chunk.bit_length() - 1
    vector = operands.log_decay.ndim < 5
    of_keys, more = key_dim * (levels + 1 if vector else 1), tiling.replaces
    inside = tiling.chunk * ((1 + more) * (of_keys + value_dim) + more * 2 * levels * tiling.chunk)
    tokens = batch * heads * tiling.length
    return pl.CostEstimate(
        flops=2 * passes * tokens * (inside + (2 + more) * key_dim * value_dim),
        transcendentals=passes * tokens * (levels * key_dim if vector else tiling.chunk),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)),
    )
