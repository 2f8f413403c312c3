"""What every sequence mixer (attention, scan, recurrence) shares: its config's base and the context of a call."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.distance import DistanceBias
from llmjax.nn.initializers import Init
from pallas_kernels.ring_attention.layout import Layout

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
class Distance:
    """A bias of attention scores by distance, one table for all layers."""

    table: Float[Array, "heads entries"]
    config: DistanceBias = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Memory:
    """What cross-attention looks at: an encoder's states, and which of them are there (None: all)."""

    states: Float[Array, "batch source d_model"]
    segment_ids: Int[Array, "batch source"] | None = None


@flax.struct.dataclass
class Context:
    """What the layers of one forward pass share.

    `positions` count from 0 in each document; padding has -1. `segment_ids` are the documents of packed batches, -1 for
    padding; None where the batch holds neither. `prefix` marks tokens that all of their document may see (prefix LM,
    Dong et al. 2019, 1905.03197). `layout` tells in which order the tokens stand, where devices share a sequence.
    """

    positions: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"] | None = None
    cache: Cache | None = None
    prefix: Bool[Array, "batch length"] | None = None
    distance: Distance | None = None
    memory: Memory | None = None
    deterministic: bool = flax.struct.field(pytree_node=False, default=True)
    layout: Layout = flax.struct.field(pytree_node=False, default="contiguous")


@dataclass(frozen=True)
class Mixer:
    """Base of the sequence mixers: `(x, context, state) -> (y, state)`, x and y `[batch, length, d_model]`.

    Without a state a call is a whole sequence; with one it is the next tokens of it, one or many. Tokens of one segment
    never see another's, and padding changes nothing that is not padding. Where a method has several equal forms, a
    field `form` names them, the cheapest first.
    """

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module, one of `layers` in its stack."""
        raise NotImplementedError

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Field and reason for each value that does not fit a model of this width."""
        return iter(())

    def sees_future(self) -> bool:
        """Whether a token's output depends on later tokens: such a mixer is for encoders."""
        return False

    def any_order(self) -> bool:
        """Whether tokens are known by their positions alone, so that they may stand in any order."""
        return False

    def distance_heads(self) -> int | None:
        """Heads whose scores a `DistanceBias` may change; None where there are no such scores."""
        return None

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """Empty decode state with room for `length` tokens; keys and values have that `dtype`, recurrences float32."""
        raise NotImplementedError

    def matmul_params(self, d_model: int) -> int:
        """Weights that multiply each token (what FLOPs are counted from)."""
        raise NotImplementedError

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Forward FLOPs per token of the mixing itself in a sequence of `length`, causal pairs counted once."""
        raise NotImplementedError

    def state_bytes(self, d_model: int, length: int, dtype: DTypeLike) -> int:
        """Bytes of the decode state of one sequence with room for `length` tokens."""
        state = jax.eval_shape(lambda: self.init_state(d_model, 1, length, dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
