"""What the TPU's two kernels of the selective scan share: how arrays lie, which block of them a step works on.

States are [state, channels]: states along sublanes, channels along lanes. The grid runs over batch, parts of the
channels, blocks of tokens and, innermost, the part's blocks of channels, whose states all stay in vector memory. So B
and C are spread over the lanes once for all channels, and their gradients are summed over channels before they leave.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
SUBLANES = 8
TOGETHER = 16
"""Tokens that are read and written together: the rows of a tile of bfloat16."""
LOG2E = 1.4426950408889634
VMEM_BYTES = 40 * 2**20
"""What a kernel may take of a core's vector memory: v5p and tpu7x have 64 MiB, v5e and v6e 128."""
ORDER: Any = ("parallel", "parallel", "arbitrary", "arbitrary")


class Operands(NamedTuple):
    """What the kernels read, or its gradients, or blocks of either. `keep` is 0 where a segment begins, else 1."""

    x: Float[Array, "batch length width"]
    dt: Float[Array, "batch length width"]
    B: Float[Array, "batch groups length state"]
    C: Float[Array, "batch groups length state"]
    A: Float[Array, "state width"]
    D: Float[Array, "1 width"] | None
    z: Float[Array, "batch length width"] | None
    dt_bias: Float[Array, "1 width"] | None
    keep: Float[Array, "batch groups length state"] | None
    initial: Float[Array, "batch state width"]


@dataclass(frozen=True)
class Plan:
    """The static numbers of the kernels: lengths that are whole blocks, and the blocks."""

    batch: int
    length: int
    width: int
    groups: int
    state: int
    block: int
    """tokens"""
    most: int
    """numbers in the states of a block of channels; more where `LANES` channels have more"""
    reverse: bool
    softplus: bool

    @property
    def channels(self) -> int:
        """Of a block: a divisor of a group's, if possible one that leaves an even count of blocks."""
        tiles = self.width // (self.groups * LANES)
        limit = min(tiles, max(self.most // (self.state * LANES), 1))
        sizes = [size for size in range(1, limit + 1) if tiles % size == 0]
        return LANES * max(sizes, key=lambda size: (tiles // size % 2 == 0, size))

    @property
    def splits(self) -> int:
        """Parts of a group's channels, for chips with two cores."""
        return 2 - self.width // (self.groups * self.channels) % 2

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Batch, parts, blocks of tokens, blocks of channels in a part."""
        parts = self.groups * self.splits
        return self.batch, parts, self.length // self.block, self.width // (parts * self.channels)

    def cost(self, flops: int, transcendentals: int, *arrays: Any) -> pl.CostEstimate:
        """What the compiler's scheduler is told: operations for every state of every token, and all arrays once."""
        states = self.batch * self.length * self.width * self.state
        touched = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
        return pl.CostEstimate(flops * states, transcendentals * states, touched)

    def specs(self, time: Callable[[Any], Any]) -> Any:
        """The block of each operand that a step of the grid works on; `time(t)` is the block of tokens of step t."""
        wide = pl.BlockSpec((None, self.block, self.channels), lambda b, p, t, d: (b, time(t), self.at(p, d)))
        narrow = pl.BlockSpec(
            (None, None, self.block, self.state),
            lambda b, p, t, d: (b, jax.lax.div(p, jnp.int32(self.splits)), time(t), 0),
        )
        row = pl.BlockSpec((1, self.channels), lambda b, p, t, d: (0, self.at(p, d)))
        weights = pl.BlockSpec((self.state, self.channels), lambda b, p, t, d: (0, self.at(p, d)))
        specs: list[Any] = [wide, wide, narrow, narrow, weights, row, wide, row, narrow, self.at_step(0, self.state)]
        return Operands(*specs)

    def starts(self, time: Callable[[Any], Any]) -> pl.BlockSpec:
        """The spec of the states before each block of tokens, [batch, blocks, state, width]."""
        return pl.BlockSpec((None, None, self.state, self.channels), lambda b, p, t, d: (b, time(t), 0, self.at(p, d)))

    def at(self, part: Any, block: Any) -> Any:
        """The block among those of all channels."""
        return part * self.grid[3] + block

    def at_step(self, step: int, rows: int) -> pl.BlockSpec:
        """The spec of [batch, rows, width] that is read or written in one step of time only, all its channels."""
        # Other steps stay at the block next to it in the grid's order: nothing is copied twice.
        rest = 0 if step else self.grid[3] - 1
        return pl.BlockSpec(
            (None, rows, self.channels), lambda b, p, t, d: (b, 0, self.at(p, jnp.where(t == step, d, rest)))
        )

    def tokens(self, group: Any) -> Any:
        """The group's `TOGETHER` tokens, groups counted in the direction of the recurrence."""
        last = self.block // TOGETHER - 1
        return pl.ds(pl.multiple_of((last - group if self.reverse else group) * TOGETHER, TOGETHER), TOGETHER)

    @property
    def rows(self) -> range:
        """The tokens of a group in the direction of the recurrence."""
        return range(TOGETHER)[:: -1 if self.reverse else 1]

    def vector(self, *shape: int) -> Any:
        """A float32 array in vector memory."""
        return pltpu.VMEM(shape, jnp.float32)


def only(given: Operands, those: Any) -> Any:
    """`those`, without the operands that are not given."""
    chosen: list[Any] = [None if value is None else other for value, other in zip(given, those)]
    return Operands(*chosen)


def spread(columns: Any, wide: Any) -> None:
    """wide[token, state, lane] = columns[token, state]."""
    by_state = columns[...].astype(jnp.float32).T
    for token in range(by_state.shape[1]):
        wide[token] = jnp.broadcast_to(by_state[:, token : token + 1], wide.shape[1:])


def over(wide: Float[Array, "state lanes"], channels: int) -> Float[Array, "state channels"]:
    """Equal lanes, as many as there are channels."""
    return jnp.tile(wide, (1, channels // LANES))


def decay_of(plan: Plan, dt: Array, A: Array, keep: Any, token: Any) -> Array:
    """exp(dt A) of a token, 0 where a segment begins."""
    decay = jnp.exp2(dt * A)
    return decay if keep is None else decay * over(keep[token], plan.channels)


def softplus(raw: Array) -> Array:
    """log(1 + exp(raw))."""
    return jnp.maximum(raw, 0) + jnp.log1p(jnp.exp(-jnp.abs(raw)))


def raw_steps(blocks: Any, tokens: Any) -> Array:
    """The steps of some tokens before the softplus."""
    raw = blocks.dt[tokens, :].astype(jnp.float32)
    return raw if blocks.dt_bias is None else raw + blocks.dt_bias[...]
