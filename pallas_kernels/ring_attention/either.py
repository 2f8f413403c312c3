"""Attention over a split sequence by the way that waits least: a ring of keys, or an exchange of heads."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import chips
from pallas_kernels.attention.api import check_window
from pallas_kernels.ring_attention.api import ring_attention
from pallas_kernels.ring_attention.layout import Layout
from pallas_kernels.ring_attention.ulysses import choose, refusals, ulysses_attention

FLOPS_PER_BYTE = {"v5e": 2600.0, "v5p": 3100.0, "v6e": 2600.0, "tpu7x": 5600.0}
"""What an attention kernel computes while a byte crosses one link: 0.6, 0.6, 0.25 and 0.22 of the chips' peaks, which
tokamax publishes of its causal kernel, over 0.9 of the data sheets' bandwidths."""


def context_attention(
    query: Float[Array, "batch local_length heads head_dim"],
    key: Float[Array, "batch local_length kv_heads head_dim"],
    value: Float[Array, "batch local_length kv_heads value_dim"],
    *,
    axis_name: str,
    layout: Layout = "zigzag",
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    **options: Any,
) -> Any:
    """`ring_attention`, or `ulysses_attention` over the same axis where heads are exchanged sooner.

    On TPUs `choose` says which. On GPUs, where no kernel carries the softmax from hop to hop, heads are exchanged
    wherever they divide, so that the kernels of `attention` do the work. Elsewhere it is the ring. `options` are those
    that both take.
    """
    options |= dict(axis_name=axis_name, layout=layout, is_causal=is_causal, local_window_size=local_window_size)
    shards = jax.lax.axis_size(axis_name)
    way = ring_attention
    if exchanges_heads(query, key, value, shards, is_causal, local_window_size):
        way = ulysses_attention
    return way(query, key, value, **options)


def exchanges_heads(
    query: Array,
    key: Array,
    value: Array,
    shards: int,
    is_causal: bool,
    local_window_size: int | tuple[int | None, int | None] | None,
) -> bool:
    """Whether heads are exchanged on the chips that the program is traced for."""
    heads, kv_heads, head_dim = query.shape[2], key.shape[2], query.shape[3]
    platform, kind = chips.target()
    if platform == "gpu":
        return not refusals(heads, kv_heads, shards)
    chip = chips.chip_of(kind)
    if chip is None or platform != "tpu":
        return False
    reach = check_window(local_window_size)
    choice = choose(
        heads,
        kv_heads,
        query.shape[1] * shards,
        shards,
        flops_per_byte=FLOPS_PER_BYTE[chip.name],
        head_dim=head_dim,
        value_dim=value.shape[3],
        is_causal=is_causal,
        window=None if reach is None else reach[0],
        itemsize=query.dtype.itemsize,
    )
    return choice.ulysses == shards
