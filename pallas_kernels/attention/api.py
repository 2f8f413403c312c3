"""The attention function: its arguments checked, its mask described, an implementation chosen."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.call import Call
from pallas_kernels.attention.mask import Mask, Rule, Seen, pair, seen
from pallas_kernels.attention.registry import choose
from pallas_kernels.attention.tiled import Config, column_sums
from pallas_kernels.attention.vjp import Operands, Visible

Sides = tuple[Int[Array, "batch query_length"], Int[Array, "batch key_length"]] | Int[Array, "batch length"]


def attention(
    query: Float[Array, "batch query_length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    bias: Float[Array, "#batch #heads #query_length #key_length"] | None = None,
    mask: Bool[Array, "#batch #heads #query_length #key_length"] | Mask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " batch"] | None = None,
    key_value_seq_lengths: Int[Array, " batch"] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    segment_ids: Sides | None = None,
    positions: Sides | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    return_residual: bool = False,
    return_column_sums: bool = False,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> Any:
    """softmax(cap(q k^T scale) + bias) v over the keys that a query may see; layout and names of `jax.nn`'s function.

    A key is seen where `is_causal` and `local_window_size` (left, right) allow its position (`positions`, by default
    the index), its segment is the query's, both are within their lengths, and `mask` (a boolean array, or a `Mask`)
    allows it. A causal window of W tokens is (W - 1, 0). Negative positions and segments mark absent tokens; what lies
    beyond a length has no influence, even if it is not a number. Key and value heads are shared by groups of query
    heads (Ainslie et al. 2023, 2305.13245). A sink joins its head's softmax as one more score. Softmax is float32
    (float64 for float64); a query without keys gives zeros. Differentiable in query, key, value, bias and sinks.

    Returns the output in value's dtype, `[batch, query_length, heads, value_dim]`; with `return_residual` also the
    differentiable log-sum-exp, float32 `[batch, query_length, heads]`, sinks included, -inf where nothing is seen; with
    `return_column_sums` also the attention mass of every key, `[batch, heads, key_length]`, without gradient.

    `implementation`: a name of `BACKENDS`, a sequence of names in order of preference, or None for the best that fits;
    `config` its block sizes. Raises ValueError where arguments disagree, NotImplementedError, with the reasons, where
    no implementation that may be used can do it.
    """
    reach = check_window(local_window_size)
    described = Mask(is_causal, reach, segment_ids, positions, query_seq_lengths, key_value_seq_lengths)
    described &= mask if isinstance(mask, Mask) else Mask(dense=mask)
    call = checked(Operands(query, key, value, bias, sinks), described, scale, logits_soft_cap)
    call = replace(call, residual=return_residual or return_column_sums, config=config)
    out, lse = choose(call, implementation).run(call)
    if lse is None or not call.residual:
        return out
    results = [out]
    if return_residual:
        results.append(jnp.swapaxes(lse, 1, 2))
    if return_column_sums:
        results.append(column_sums(call.operands, call.visible, lse, call.rule, Config()))
    return tuple(results)


def checked(operands: Operands, mask: Mask, scale: float | None, soft_cap: float | None) -> Call:
    """The call that these arguments make; raises ValueError where they disagree."""
    query, key, value, bias, sinks = operands
    check_shapes(query, key, value)
    check_mask(mask, query, key)
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"logits_soft_cap={soft_cap} must be positive, or None")
    if sinks is not None and sinks.shape != query.shape[2:3]:
        raise ValueError(f"sinks have shape {sinks.shape}, query {query.shape}: expected [heads]")
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    rule = Rule(scale, mask.is_causal, check_window(mask.local_window_size), soft_cap)
    tokens = seen(mask, (query.shape[1], key.shape[1]))
    visible = Visible(tokens, check_scores("mask", mask.dense, query, key))
    if mask.query_seq_lengths is not None or mask.key_value_seq_lengths is not None:
        query, key, value = present(query, key, value, tokens)
    operands = Operands(query, key, value, check_scores("bias", bias, query, key), sinks)
    return Call(operands, visible, mask, rule)


def present(query: Array, key: Array, value: Array, tokens: Seen) -> tuple[Array, Array, Array]:
    """The arrays with zeros in place of what absent tokens hold, which may be anything (0 * nan is nan)."""
    assert tokens.segments is not None
    there = [(ids >= 0)[:, :, None, None] for ids in tokens.segments]
    return jnp.where(there[0], query, 0), jnp.where(there[1], key, 0), jnp.where(there[1], value, 0)


def check_shapes(query: Array, key: Array, value: Array) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the three arrays fit together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; expected [batch, length, heads, head_dim]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}; expected a floating dtype")
        if x.dtype != query.dtype:
            raise ValueError(f"query has dtype {query.dtype}, {name} {x.dtype}: they must agree")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key has shape {key.shape}, value {value.shape}: batch, length and heads must agree")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query has shape {query.shape}, key {key.shape}: batch and head_dim must agree")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(f"query has shape {query.shape}, key {key.shape}: kv heads must divide heads")


def check_scores(name: str, x: Array | None, query: Array, key: Array) -> Array | None:
    """A bias or a dense mask with four axes, each 1 or that of the scores."""
    if x is None:
        return None
    scores = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    shape = (1,) * (4 - x.ndim) + x.shape
    if x.ndim > 4 or any(have not in (1, want) for have, want in zip(shape, scores)):
        wanted = f"[batch, heads, query_length, key_length] = {scores}"
        raise ValueError(f"{name} has shape {x.shape}, query {query.shape}, key {key.shape}: expected {wanted}")
    if name == "mask" and x.dtype != bool:
        raise ValueError(f"mask has dtype {x.dtype}; expected a boolean array or a Mask")
    return jnp.reshape(x, shape)


def check_window(size: int | tuple[int | None, int | None] | None) -> tuple[int | None, int | None] | None:
    """A pair of tokens to the left and to the right, neither negative; None where neither side is bounded."""
    sides = (size, size) if size is None or isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(side is not None and side < 0 for side in sides):
        raise ValueError(f"local_window_size={size} must be one or two numbers of tokens, none negative")
    return None if sides == (None, None) else (sides[0], sides[1])


def check_mask(mask: Mask, query: Array, key: Array) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the mask's arrays fit the queries and the keys."""
    sides = (("query", query), ("key", key))
    for what in ("positions", "segment_ids"):
        for (name, x), ids in zip(sides, pair(getattr(mask, what))):
            if ids is None:
                continue
            if ids.ndim != 2 or ids.shape[0] not in (1, x.shape[0]) or ids.shape[1] != x.shape[1]:
                raise ValueError(f"{what} of the {name} side have shape {ids.shape}, {name} has {x.shape}")
            if not jnp.issubdtype(ids.dtype, jnp.integer):
                raise ValueError(f"{what} of the {name} side have dtype {ids.dtype}; expected integers")
    if (pair(mask.positions)[0] is None) != (pair(mask.positions)[1] is None):
        raise ValueError("positions must be given for queries and keys, or for neither")
    for what, (name, x) in zip(("query_seq_lengths", "key_value_seq_lengths"), sides):
        counts = getattr(mask, what)
        if counts is None:
            continue
        if counts.shape != x.shape[:1] or not jnp.issubdtype(counts.dtype, jnp.integer):
            raise ValueError(f"{what} have shape {counts.shape} and dtype {counts.dtype}, {name} has {x.shape}")
        if not isinstance(counts, jax.core.Tracer) and np.any(np.asarray(counts) < 0):
            raise ValueError(f"{what}={np.asarray(counts)} must not be negative")
    if mask.local_window_size is not None and mask.positions is None and query.shape[1] != key.shape[1]:
        window, shapes = mask.local_window_size, f"query has shape {query.shape}, key {key.shape}"
        raise ValueError(f"local_window_size={window} between different lengths needs positions: {shapes}")
