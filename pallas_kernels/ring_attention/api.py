"""Ring attention: the function for use inside `jax.shard_map`, and the same over a mesh."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.attention.api import Sides, check_window, checked
from pallas_kernels.attention.mask import Mask, Rule
from pallas_kernels.attention.vjp import Operands
from pallas_kernels.ring_attention.layout import Layout, check_layout
from pallas_kernels.ring_attention.registry import choose
from pallas_kernels.ring_attention.ring import Ring, around, varying


def ring_attention(
    query: Float[Array, "batch local_length heads head_dim"],
    key: Float[Array, "batch local_length kv_heads head_dim"],
    value: Float[Array, "batch local_length kv_heads value_dim"],
    *,
    axis_name: str,
    layout: Layout = "zigzag",
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    segment_ids: Sides | None = None,
    positions: Sides | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> Any:
    """`attention` of a sequence whose tokens are split over the mesh axis `axis_name`, inside `jax.shard_map`.

    Every device gives its own queries, keys and values, equally many, and its own part of `segment_ids` and
    `positions`; these, the window, cap and sinks mean what they mean in `attention`, and the results are this device's
    part of what it returns. `layout` says which tokens the devices hold (`to_layout` arranges them); masks go by the
    tokens' positions, so that every layout is exact. Keys and values pass around the ring, shards - 1 times sent on;
    with contiguous shards, a causal window of (left, ...) and no `positions`, ceil(left / local_length) times. Keys
    that lie in the future of a shard's queries, beyond their window or in other segments are passed on unread. Memory
    per device depends on the local length alone. Differentiable once; the gradients of keys and values travel with
    them in float32. Liu et al. 2023 (2310.01889).

    `implementation`: "tpu", "xla" or some of them in order; None takes the first that can do it; `config` its block
    sizes. Pallas kernels want `check_vma=False` of `jax.shard_map`. Raises ValueError where arguments disagree or the
    local length is odd with zigzag, NotImplementedError with the reasons where no implementation can do it.
    """
    described = Mask(is_causal, check_window(local_window_size), segment_ids, positions)
    call = checked(Operands(query, key, value, None, sinks), described, scale, logits_soft_cap)
    length = query.shape[1]
    if key.shape[1] != length:
        raise ValueError(f"query has shape {query.shape}, key {key.shape}: shards of both must have the same length")
    check_layout(length, layout)
    shards = jax.lax.axis_size(axis_name)
    hops = hops_of(shards, length, call.rule) if layout == "contiguous" and positions is None else shards - 1
    steps = choose(implementation, call.operands, call.visible.seen, call.rule)
    if config is None:
        config = steps.heuristic(*call.operands[:3], call.rule, 2 if layout == "zigzag" else 1)
    ring = Ring(axis_name, shards, layout, hops, call.rule, steps, config)
    arrays = (call.operands, call.visible.seen)
    out, lse = around(ring, *varying(arrays, arrays, axes=(axis_name,)))
    return (out, lse) if return_residual else out


def hops_of(shards: int, length: int, rule: Rule) -> int:
    """How often keys must be sent on between contiguous shards."""
    left, right = rule.window or (None, None)
    if left is None or not (rule.causal or right == 0):
        return shards - 1
    return min(shards - 1, -(-left // length))


def sharded_ring_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads value_dim"],
    *,
    spec: PartitionSpec,
    mesh: Mesh | None = None,
    segment_ids: Sides | None = None,
    positions: Sides | None = None,
    sinks: Float[Array, " heads"] | None = None,
    return_residual: bool = False,
    **options: Any,
) -> Any:
    """`ring_attention` of whole arrays over `mesh` (None: the mesh in use), with the rest of its `options`.

    `spec` names the mesh axes of batch, length and heads of all three arrays, as `P("data", "context", "tensor")`; the
    length's axis is the ring. The tokens are in the order of the layout already. Returns whole arrays.
    """
    batch, length, heads = (*spec, None, None, None)[:3]

    def ids(x: Array) -> PartitionSpec:
        return PartitionSpec(batch if x.shape[0] > 1 else None, length)

    arrays = {"segment_ids": segment_ids, "positions": positions, "sinks": sinks}
    specs = {name: jax.tree.map(ids, arrays[name]) for name in ("segment_ids", "positions")}
    specs["sinks"] = None if sinks is None else PartitionSpec(heads)
    whole = PartitionSpec(batch, length, heads)
    options |= {"axis_name": length, "return_residual": return_residual}

    def local(query: Array, key: Array, value: Array, arrays: dict[str, Any]) -> Any:
        return ring_attention(query, key, value, **arrays, **options)

    out = (whole, whole) if return_residual else whole
    run = jax.shard_map(local, mesh=mesh, in_specs=(whole, whole, whole, specs), out_specs=out, check_vma=False)
    return run(query, key, value, arrays)
