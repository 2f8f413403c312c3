"""What every sequence mixer (attention, scan, recurrence) shares: its config's base and the context of a call."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from llmjax.nn.initializers import Init

State = Any
"""Decode state of one mixer: a pytree of arrays whose first axis is the batch."""


@flax.struct.dataclass
class Cache:
    """Where decoding stands: the slot that this call's tokens start at, and the position of every slot's token.

    These tokens are included; -1 is an empty slot or padding.
    """

    slot: Int[Array, ""]
    positions: Int[Array, "batch cache"]


@flax.struct.dataclass
class Context:
    """What the layers of one forward pass share.

    `positions` count from 0 in each document; padding has -1. `segment_ids` are of packed training batches, `cache` of
    decoding; never both.
    """

    positions: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"] | None = None
    cache: Cache | None = None
    deterministic: bool = flax.struct.field(pytree_node=False, default=True)


@dataclass(frozen=True)
class Mixer:
    """Base of the sequence mixers: `(x, context, state) -> (y, state)`, x and y `[batch, length, d_model]`."""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module, one of `layers` in its stack."""
        raise NotImplementedError

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Field and reason for each value that does not fit a model of this width."""
        return iter(())

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """Empty decode state with room for `length` tokens."""
        raise NotImplementedError

    def matmul_params(self, d_model: int) -> int:
        """Weights that multiply each token (what FLOPs are counted from)."""
        raise NotImplementedError

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Forward FLOPs per token of the mixing itself in a sequence of `length`, causal pairs counted once."""
        raise NotImplementedError

    def state_bytes_per_token(self, d_model: int, itemsize: int) -> int:
        """Bytes that one more token of context adds to the decode state."""
        raise NotImplementedError
