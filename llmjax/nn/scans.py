"""The recurrent kernels as mixers call them: every device works on its own rows, channels, heads and tokens.

GSPMD cannot split kernels, and would gather split sequences. Calls that begin with a state, as decoding does, have
their sequences whole. Arguments and results are those of the functions of these names in `pallas_kernels`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Array, Float, Inexact, Int

import pallas_kernels as kernels
from llmjax.parallel.mesh import Names, per_device, sequence_axis
from pallas_kernels import context_kernels

Kernel = Callable[..., tuple[Array, Array]]
Arrays = Sequence[tuple[Array | None, Names]]
"""Arrays and the logical names of their axes."""

TOKENS: Names = ("batch", "length")
CHANNELS: Names = (*TOKENS, "d_inner")
HEADS: Names = (*TOKENS, "heads")
STATE: Names = ("batch", "heads", None, None)


def selective_scan(
    x: Float[Array, "batch length width"],
    dt: Float[Array, "batch length width"],
    A: Float[Array, "width state"],
    B: Float[Array, "batch length groups state"],
    C: Float[Array, "batch length groups state"],
    D: Float[Array, " width"] | None = None,
    z: Float[Array, "batch length width"] | None = None,
    *,
    dt_bias: Float[Array, " width"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch width state"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width state"]]:
    """Mamba's scan."""
    shared = (*TOKENS, "d_inner" if B.shape[2] > 1 else None, None)
    arrays: Arrays = ((x, CHANNELS), (dt, CHANNELS), (A, ("d_inner", None)), (B, shared), (C, shared))
    arrays = (*arrays, (D, ("d_inner",)), (z, CHANNELS))
    named = {"dt_bias": (dt_bias, ("d_inner",)), "segment_ids": (segment_ids, TOKENS)}
    both = kernels.selective_scan, context_kernels.context_selective_scan
    return on_parts(both, arrays, named, ("batch", "d_inner", None), initial_state, options)


def ssd(
    x: Float[Array, "batch length heads head_dim"],
    dt: Float[Array, "batch length heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "batch length groups d_state"],
    C: Float[Array, "batch length groups d_state"],
    D: Float[Array, " heads"] | None = None,
    *,
    dt_bias: Float[Array, " heads"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch heads head_dim d_state"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch length heads head_dim"], Float[Array, "batch heads head_dim d_state"]]:
    """Mamba-2's scan."""
    shared = (*TOKENS, "heads" if B.shape[2] > 1 else None, None)
    arrays: Arrays = ((x, (*HEADS, None)), (dt, HEADS), (A, ("heads",)), (B, shared), (C, shared), (D, ("heads",)))
    named = {"dt_bias": (dt_bias, ("heads",)), "segment_ids": (segment_ids, TOKENS)}
    both = kernels.ssd, context_kernels.context_ssd
    return on_parts(both, arrays, named, STATE, initial_state, options)


def gated_linear_attention(
    query: Float[Array, "batch length groups key_dim"],
    key: Float[Array, "batch length groups key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    log_decay: Float[Array, "batch length heads"] | Float[Array, "batch length heads key_dim"] | None = None,
    *,
    bonus: Float[Array, "heads key_dim"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch heads key_dim value_dim"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """RetNet, GLA, RWKV-6, mLSTM, linear attention."""
    reads, writes = ((*TOKENS, "heads" if x.shape[2] > 1 else None, None) for x in (query, key))
    decays = HEADS if log_decay is None or log_decay.ndim == 3 else (*HEADS, None)
    arrays: Arrays = ((query, reads), (key, writes), (value, (*HEADS, None)), (log_decay, decays))
    named = {"bonus": (bonus, ("heads", None)), "segment_ids": (segment_ids, TOKENS)}
    both = kernels.gated_linear_attention, context_kernels.context_gated_linear_attention
    return on_parts(both, arrays, named, STATE, initial_state, options)


def gated_delta_rule(
    query: Float[Array, "batch length groups key_dim"],
    key: Float[Array, "batch length groups key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    beta: Float[Array, "batch length heads"],
    log_decay: Float[Array, "batch length heads"] | Float[Array, "batch length heads key_dim"] | None = None,
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch heads key_dim value_dim"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """DeltaNet, Gated DeltaNet, Kimi Delta Attention."""
    reads, writes = ((*TOKENS, "heads" if x.shape[2] > 1 else None, None) for x in (query, key))
    decays = HEADS if log_decay is None or log_decay.ndim == 3 else (*HEADS, None)
    arrays: Arrays = ((query, reads), (key, writes), (value, (*HEADS, None)), (beta, HEADS), (log_decay, decays))
    both = kernels.gated_delta_rule, context_kernels.context_gated_delta_rule
    return on_parts(both, arrays, {"segment_ids": (segment_ids, TOKENS)}, STATE, initial_state, options)


def linear_recurrence(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "batch length *channels"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Inexact[Array, "batch *channels"] | None = None,
    **options: Any,
) -> tuple[Inexact[Array, "batch length *channels"], Inexact[Array, "batch *channels"]]:
    """h_t = a_t h_{t-1} + b_t."""
    channels = ("d_inner", *(None,) * (b.ndim - 3))
    a = a.reshape((1,) * (b.ndim - a.ndim) + a.shape)
    of_a = tuple(name if n > 1 else None for name, n in zip((*TOKENS, *channels), a.shape, strict=True))
    arrays: Arrays = ((b, (*TOKENS, *channels)), (a, of_a))

    def whole(b: Array, a: Array, **options: Any) -> tuple[Array, Array]:
        return kernels.linear_recurrence(a, b, **options)

    def split(b: Array, a: Array, **options: Any) -> tuple[Array, Array]:
        return kernels.context_scan(a, b, **options)

    named = {"segment_ids": (segment_ids, TOKENS)}
    return on_parts((whole, split), arrays, named, ("batch", *channels), initial_state, options)


def causal_convolution(
    x: Float[Array, "batch length width"],
    kernel: Float[Array, "taps width"],
    bias: Float[Array, " width"] | None = None,
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch taps-1 width"] | None = None,
) -> tuple[Float[Array, "batch length width"], Float[Array, "batch taps-1 width"]]:
    """A short depthwise convolution over the past."""
    arrays: Arrays = ((x, CHANNELS), (kernel, (None, "d_inner")), (bias, ("d_inner",)))
    both = kernels.causal_convolution, context_kernels.context_causal_convolution
    return on_parts(both, arrays, {"segment_ids": (segment_ids, TOKENS)}, ("batch", None, "d_inner"), initial_state, {})


def on_parts(
    both: tuple[Kernel, Kernel],
    arrays: Arrays,
    named: Mapping[str, tuple[Array | None, Names]],
    last: Names,
    initial_state: Array | None,
    options: dict[str, Any],
) -> tuple[Array, Array]:
    """The first of `both` on each device's part, or the second where that is a part of a split sequence.

    Outputs have the axes of the first array, and the last state has `last`.
    """
    axis = sequence_axis() if initial_state is None else None
    values, names = zip(*arrays, *named.values(), strict=True)
    if axis is None:
        names = tuple(tuple(None if n == "length" else n for n in name) for name in names)
    length = values[0].shape[1]

    def part(state: Array | None, *values: Array | None) -> tuple[Array, Array]:
        keywords = dict(zip(named, values[len(arrays) :], strict=True)) | options
        if axis is None or values[0] is None or values[0].shape[1] == length:
            return both[0](*values[: len(arrays)], initial_state=state, **keywords)
        return both[1](*values[: len(arrays)], axis_name=axis, **keywords)

    return per_device(part, (last, *names), (names[0], last), initial_state, *values)
