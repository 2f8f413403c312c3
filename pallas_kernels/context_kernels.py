"""Recurrent kernels of a sequence that is split over devices, for use inside `jax.shard_map`.

Whatever the kernel, the state after a device's tokens is A h + B of the state h before them. A first run from zero
gives B, `prefix` composes the maps of the devices before this one, and a second run from the state that they leave
gives the outputs. Of the first run only the last state is used, so that the compiler makes no outputs.

Every function takes this device's part of the arguments of the kernel of its name, tokens contiguous, and returns this
device's part of the outputs, and the last state of the whole sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_convolution import causal_convolution
from pallas_kernels.context_scan import Ids, Summary, ends_of, expand, joined, outer, prefix
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_linear_attention import gated_linear_attention, ssd
from pallas_kernels.segments import absent_as_zero, marks
from pallas_kernels.selective_scan import selective_scan

Run = Callable[[Any], tuple[Array, Array]]
"""From the state before a device's tokens (None: zeros) to their outputs and the state after them."""


def continued(
    run: Run,
    factor: Float[Array, "batch *#channels"],
    axis_name: str,
    segment_ids: Int[Array, "batch local_length"] | None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """The outputs of a run from the state that this device's tokens begin with, and the last state of all.

    `factor`: the product of the decays of all present tokens, those at which a segment begins among them.
    """
    _, term = run(None)
    found, ends = marks(segment_ids, reverse), jnp.zeros((2, len(term)), jnp.int32)
    if found is not None and segment_ids is not None:
        kept = ~jnp.any(found.reset, axis=1)
        factor = jnp.where(kept.reshape(-1, *(1,) * (factor.ndim - 1)), factor, 0)
        ends = ends_of(segment_ids, reverse)
    before, whole = prefix(Summary(factor, term, ends), axis_name, descending=reverse)
    state = jnp.where(expand(joined(before.ids, ends), term), before.term, 0)
    return run(state)[0], whole.term


def context_selective_scan(
    x: Float[Array, "batch local_length width"],
    dt: Float[Array, "batch local_length width"],
    A: Float[Array, "width state"],
    B: Float[Array, "batch local_length groups state"],
    C: Float[Array, "batch local_length groups state"],
    D: Float[Array, " width"] | None = None,
    z: Float[Array, "batch local_length width"] | None = None,
    *,
    axis_name: str,
    dt_bias: Float[Array, " width"] | None = None,
    dt_softplus: bool = False,
    segment_ids: Int[Array, "batch local_length"] | None = None,
    reverse: bool = False,
    implementation: Any = None,
) -> tuple[Float[Array, "batch local_length width"], Float[Array, "batch width state"]]:
    """`selective_scan`; a device's tokens decay its states by exp(A sum_t dt_t)."""
    options: dict[str, Any] = dict(dt_bias=dt_bias, dt_softplus=dt_softplus, segment_ids=segment_ids)
    options |= dict(reverse=reverse, implementation=implementation)
    steps = steps_of(dt, dt_bias, dt_softplus, segment_ids)
    factor = jnp.exp(jnp.sum(steps, axis=1)[..., None] * A.astype(steps.dtype))

    def run(state: Array | None) -> tuple[Array, Array]:
        return selective_scan(x, dt, A, B, C, D, z, initial_state=state, **options)

    return continued(run, factor, axis_name, segment_ids, reverse)


def context_ssd(
    x: Float[Array, "batch local_length heads head_dim"],
    dt: Float[Array, "batch local_length heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "batch local_length groups d_state"],
    C: Float[Array, "batch local_length groups d_state"],
    D: Float[Array, " heads"] | None = None,
    z: Float[Array, "batch local_length heads head_dim"] | None = None,
    *,
    axis_name: str,
    dt_bias: Float[Array, " heads"] | None = None,
    dt_softplus: bool = False,
    segment_ids: Int[Array, "batch local_length"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch local_length heads head_dim"], Float[Array, "batch heads head_dim d_state"]]:
    """`ssd`; a device's tokens decay the states of a head by exp(A sum_t dt_t)."""
    options |= dict(dt_bias=dt_bias, dt_softplus=dt_softplus, segment_ids=segment_ids)
    steps = steps_of(dt, dt_bias, dt_softplus, segment_ids)
    factor = jnp.exp(jnp.sum(steps, axis=1) * A.astype(steps.dtype))[..., None, None]

    def run(state: Array | None) -> tuple[Array, Array]:
        return ssd(x, dt, A, B, C, D, z, initial_state=state, **options)

    return continued(run, factor, axis_name, segment_ids)


def steps_of(
    dt: Float[Array, "batch length width"],
    dt_bias: Float[Array, " width"] | None,
    dt_softplus: bool,
    segment_ids: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length width"]:
    """The steps of a state-space model in float32 or wider, zero for absent tokens, which may hold anything."""
    found = marks(segment_ids)
    steps = absent_as_zero(found, dt).astype(jnp.promote_types(dt.dtype, jnp.float32))
    steps = steps if dt_bias is None else steps + dt_bias.astype(steps.dtype)
    return absent_as_zero(found, jax.nn.softplus(steps) if dt_softplus else steps)


def context_gated_linear_attention(
    query: Float[Array, "batch local_length groups key_dim"],
    key: Float[Array, "batch local_length groups key_dim"],
    value: Float[Array, "batch local_length heads value_dim"],
    log_decay: Float[Array, "batch local_length heads"] | Float[Array, "batch local_length heads key_dim"] | None,
    *,
    axis_name: str,
    segment_ids: Int[Array, "batch local_length"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch local_length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """`gated_linear_attention`; a device's tokens decay the states of a head by exp(sum_t log_decay_t)."""
    wide = jnp.promote_types(value.dtype, jnp.float32)
    factor = jnp.ones((value.shape[0], 1, 1, 1), wide)
    if log_decay is not None:
        decay = absent_as_zero(marks(segment_ids), log_decay).astype(wide)
        factor = jnp.exp(jnp.sum(decay, axis=1)).reshape(*decay.shape[::2][:2], -1, 1)

    def run(state: Array | None) -> tuple[Array, Array]:
        return gated_linear_attention(
            query, key, value, log_decay, initial_state=state, segment_ids=segment_ids, **options
        )

    return continued(run, factor, axis_name, segment_ids)


# ---- states that a matrix turns -------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What a chunk of tokens does to a state whose columns a matrix turns: S -> factor S + term."""

    factor: Float[Array, "batch heads key_dim key_dim"]
    term: Float[Array, "batch heads key_dim value_dim"]
    ids: Ids

    def empty(self) -> "Turn":
        """A chunk without tokens."""
        eye = jnp.broadcast_to(jnp.eye(self.factor.shape[-1], dtype=self.factor.dtype), self.factor.shape)
        return Turn(eye, jnp.zeros_like(self.term), jnp.full_like(self.ids, -1))

    def after(self, before: "Turn") -> "Turn":
        """The two chunks as one."""
        factor = jnp.where(expand(joined(before.ids, self.ids), self.factor), self.factor, 0)
        return Turn(factor @ before.factor, self.term + factor @ before.term, outer(before.ids, self.ids))


def turned(
    run: Callable[[Array, Array | None], tuple[Array, Array]],
    value: Float[Array, "batch local_length heads value_dim"],
    key_dim: int,
    axis_name: str,
    segment_ids: Int[Array, "batch local_length"] | None,
) -> tuple[Float[Array, "batch local_length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """`continued` for a `run` of (values, state before them) in which each column of the state is for itself.

    Beside the columns that begin at zero, the columns of the identity, which nothing is written to, end as the matrix.
    """
    batch, _, heads, value_dim = value.shape
    wide = jnp.promote_types(value.dtype, jnp.float32)
    eye = jnp.broadcast_to(jnp.eye(key_dim, dtype=wide), (batch, heads, key_dim, key_dim))
    both = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, key_dim)))
    _, end = run(both, jnp.pad(eye, ((0, 0), (0, 0), (0, 0), (value_dim, 0))))
    ends = jnp.zeros((2, batch), jnp.int32) if segment_ids is None else ends_of(segment_ids, False)
    before, whole = prefix(Turn(end[..., value_dim:], end[..., :value_dim], ends), axis_name)
    state = jnp.where(expand(joined(before.ids, ends), before.term), before.term, 0)
    return run(value, state)[0], whole.term


def context_gated_delta_rule(
    query: Float[Array, "batch local_length groups key_dim"],
    key: Float[Array, "batch local_length groups key_dim"],
    value: Float[Array, "batch local_length heads value_dim"],
    beta: Float[Array, "batch local_length heads"],
    log_decay: Float[Array, "batch local_length heads"] | Float[Array, "batch local_length heads key_dim"] | None,
    *,
    axis_name: str,
    segment_ids: Int[Array, "batch local_length"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch local_length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """`gated_delta_rule`."""
    options |= dict(segment_ids=segment_ids)

    def run(value: Array, state: Array | None) -> tuple[Array, Array]:
        return gated_delta_rule(query, key, value, beta, log_decay, initial_state=state, **options)

    return turned(run, value, key.shape[3], axis_name, segment_ids)


# ---- convolutions ----------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The last inputs of a chunk's last segment, as many as taps look back on, zeros before them if it has fewer."""

    last: Float[Array, "batch past width"]
    number: Int[Array, " batch"]
    """how many there are"""
    whole: Int[Array, " batch"]
    """1 where the chunk is of one segment"""
    ids: Ids

    def empty(self) -> "Inputs":
        """A chunk without tokens."""
        none = jnp.zeros_like(self.number)
        return Inputs(jnp.zeros_like(self.last), none, none + 1, jnp.full_like(self.ids, -1))

    def after(self, before: "Inputs") -> "Inputs":
        """The two chunks as one."""
        past = self.last.shape[1]
        passed = self.whole.astype(bool) & joined(before.ids, self.ids)
        place = jnp.arange(past)[None]
        moved = jnp.take_along_axis(before.last, jnp.minimum(place + self.number[:, None], past - 1)[..., None], axis=1)
        older = (place < past - self.number[:, None]) & passed[:, None]
        last = jnp.where(older[..., None], moved, self.last)
        number = jnp.minimum(self.number + jnp.where(passed, before.number, 0), past)
        return Inputs(last, number, jnp.where(passed, before.whole, 0), outer(before.ids, self.ids))


def context_causal_convolution(
    x: Float[Array, "batch local_length width"],
    kernel: Float[Array, "taps width"],
    bias: Float[Array, " width"] | None = None,
    *,
    axis_name: str,
    segment_ids: Int[Array, "batch local_length"] | None = None,
) -> tuple[Float[Array, "batch local_length width"], Float[Array, "batch taps-1 width"]]:
    """`causal_convolution`: devices tell each other the last inputs of their last segments."""
    past = kernel.shape[0] - 1
    if not past:
        return causal_convolution(x, kernel, bias, segment_ids=segment_ids)
    ids = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    ends = ends_of(ids, False)
    found = marks(ids)
    assert found is not None
    run = jnp.cumsum(found.reset, axis=1)
    count = jnp.sum(found.present & (run == run[:, -1:]), axis=1, dtype=jnp.int32)
    _, last = causal_convolution(x, kernel, segment_ids=segment_ids)
    mine = Inputs(last, jnp.minimum(count, past), (run[:, -1] == 0).astype(jnp.int32), ends)
    before, whole = prefix(mine, axis_name)
    state = jnp.where(joined(before.ids, ends)[:, None, None], before.last, 0)
    y, _ = causal_convolution(x, kernel, bias, initial_state=state, segment_ids=segment_ids)
    return y, whole.last
