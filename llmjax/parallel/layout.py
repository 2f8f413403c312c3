"""Tokens of a split sequence arranged so that every device has as much causal attention to do as any other.

A contiguous part of a sequence sees all parts before it, so that the last device works 1.9 times as much as the mean of
eight. In the zigzag layout device r of P has parts r and 2P - 1 - r of 2P (Llama 3, 2407.21783, section 3.3.2). Layers
that know tokens by their positions alone do not notice.
"""

from functools import partial
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec

from llmjax.parallel.mesh import sequence_axis
from pallas_kernels.ring_attention.layout import exchanged

Tree = TypeVar("Tree")


def halves(length: int) -> bool:
    """Whether a sequence of this length is split over devices where the program is traced, two equal parts on each."""
    axis = sequence_axis()
    return axis is not None and length % (2 * jax.sharding.get_abstract_mesh().shape[axis]) == 0


def to_zigzag(tree: Tree) -> Tree:
    """Arrays `[batch, length, ...]` of contiguous parts in the zigzag layout: each device sends each half once."""
    return rearranged(tree, back=False)


def from_zigzag(tree: Tree) -> Tree:
    """The inverse of `to_zigzag`."""
    return rearranged(tree, back=True)


def rearranged(tree: Tree, back: bool) -> Tree:
    """All arrays of a tree in the other layout; GSPMD splits their other axes."""
    axis = sequence_axis()
    assert axis is not None
    rows = PartitionSpec(None, axis)
    move = partial(exchanged, axis_name=axis, back=back)
    run = jax.shard_map(
        partial(jax.tree.map, move), in_specs=(rows,), out_specs=rows, axis_names={axis}, check_vma=False
    )
    return run(tree)
