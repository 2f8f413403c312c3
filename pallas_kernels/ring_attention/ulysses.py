"""Ulysses: while attention is computed, heads are split over devices in place of the length; ring, Ulysses or both.

An all-to-all turns [batch, length / P, heads, dim] into [batch, length, heads / P, dim], ordinary attention follows,
and another turns its output back (Jacobs et al. 2023, 2309.14509). On a second mesh axis a ring may take the
place of ordinary attention (Fang and Zhao 2024, 2405.07719).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import attention
from pallas_kernels.attention.api import Sides
from pallas_kernels.ring_attention.api import ring_attention
from pallas_kernels.ring_attention.layout import Layout, order


def ulysses_attention(
    query: Float[Array, "batch local_length heads head_dim"],
    key: Float[Array, "batch local_length kv_heads head_dim"],
    value: Float[Array, "batch local_length kv_heads value_dim"],
    *,
    axis_name: str,
    ring_axis: str | None = None,
    layout: Layout = "contiguous",
    segment_ids: Sides | None = None,
    positions: Sides | None = None,
    sinks: Float[Array, " heads"] | None = None,
    return_residual: bool = False,
    **options: Any,
) -> Any:
    """`attention` of a sequence whose tokens are split over `axis_name`, inside `jax.shard_map`, by exchange of heads.

    Arguments and results are this device's part of those of `attention`, `options` the rest of what it takes. `layout`
    is that of the tokens over `axis_name`. With `ring_axis` the sequence is split over both axes: `layout` is that of
    the ring's shards, each of them cut into contiguous parts over `axis_name`, and `options` are those of
    `ring_attention`. Fewer key heads than devices are repeated. Raises ValueError where the devices do not divide the
    heads, nor the key heads the devices or the other way around.
    """
    shards = jax.lax.axis_size(axis_name)
    reasons = refusals(query.shape[2], key.shape[2], shards)
    if reasons:
        raise ValueError(f"query has shape {query.shape}, key {key.shape}: {'; '.join(reasons)}")
    repeats = -(-shards // key.shape[2])
    key, value = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (key, value))
    query, key, value = (jax.lax.all_to_all(x, axis_name, 2, 1, tiled=True) for x in (query, key, value))
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
    arrays = {"segment_ids": jax.tree.map(gather, segment_ids), "positions": jax.tree.map(gather, positions)}
    if sinks is not None:
        arrays["sinks"] = jax.lax.dynamic_slice_in_dim(
            sinks, jax.lax.axis_index(axis_name) * query.shape[2], query.shape[2]
        )
    if ring_axis is not None:
        arrays |= {"axis_name": ring_axis, "layout": layout}
    elif layout != "contiguous" and positions is None:
        arrays["positions"] = jnp.asarray(order(query.shape[1], shards, layout))[None]
    inner = attention if ring_axis is None else ring_attention
    results = inner(query, key, value, return_residual=return_residual, **arrays, **options)
    return jax.tree.map(lambda x: jax.lax.all_to_all(x, axis_name, 1, 2, tiled=True), results)


def refusals(heads: int, kv_heads: int, shards: int) -> list[str]:
    """Why so many devices cannot exchange these heads."""
    reasons = [] if heads % shards == 0 else [f"{heads} heads are not divided by {shards} devices"]
    if kv_heads % shards and shards % kv_heads:
        reasons.append(f"{kv_heads} key heads neither divide {shards} devices nor are divided by them")
    return reasons


@dataclass(frozen=True)
class Choice:
    """How to split a sequence: over a ring of `ring` devices times an exchange of heads among `ulysses`."""

    ring: int
    ulysses: int
    reasons: tuple[str, ...]
    """what each way costs or why it is impossible, the chosen one first"""


def choose(
    heads: int,
    kv_heads: int,
    length: int,
    shards: int,
    *,
    flops_per_byte: float,
    head_dim: int = 128,
    value_dim: int | None = None,
    is_causal: bool = True,
    window: int | None = None,
    itemsize: int = 2,
) -> Choice:
    """The split of one sequence over `shards` devices whose forward pass waits least for the network.

    `flops_per_byte`: what a device computes while one byte crosses its link (v5p: 367 TFLOP/s over 86 GB/s, 4300; H200:
    600 over 450, 1300). A ring waits where sending a block takes longer than the work on it; an exchange of heads waits
    for all that it sends. Of equals the longest ring, which any number of heads allows. Raises ValueError where the
    shards do not divide the length.
    """
    if length % shards:
        raise ValueError(f"{shards} shards do not divide the length {length}")
    dims = head_dim + (head_dim if value_dim is None else value_dim)
    span = (length + 1) / 2 if is_causal else length
    span = span if window is None else min(span, window + 1)

    def ways() -> Iterator[tuple[float, int, str]]:
        for ulysses in (n for n in range(1, shards + 1) if shards % n == 0):
            ring = shards // ulysses
            name = f"ring {ring} x Ulysses {ulysses}"
            impossible = refusals(heads, kv_heads, ulysses)
            if impossible:
                yield float("inf"), ulysses, f"{name}: {'; '.join(impossible)}"
                continue
            local, keys = length // ring, max(kv_heads // ulysses, 1)
            hops = ring - 1 if window is None or not is_causal else min(ring - 1, -(-window // local))
            sent = local * keys * dims * itemsize
            work = 2 * dims * heads // ulysses * local * span / (hops + 1)
            waits = hops * max(sent - work / flops_per_byte, 0.0)
            moved = (heads + max(kv_heads, ulysses)) * dims * itemsize * length / shards * (ulysses - 1) / ulysses
            text = f"{hops} hops of {sent / 1e6:.3g} MB behind {work / 1e9:.3g} GFLOP, {moved / 1e6:.3g} MB exchanged"
            yield waits + moved, ulysses, f"{name}: {text}, waits for {(waits + moved) / 1e6:.3g} MB"

    found = sorted(ways())
    return Choice(shards // found[0][1], found[0][1], tuple(text for _, _, text in found))
