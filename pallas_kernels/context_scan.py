"""Linear recurrences of a sequence that is split over devices: local scans, an exchange of their maps, one correction.

A chunk of tokens maps the state before it to the state after it by h -> A h + B, with A the product of its decays and B
its last state from zero. Such maps compose associatively, (A2, B2) after (A1, B1) = (A2 A1, A2 B1 + B2), so that the
states before all P chunks come of 1 + log2(P - 1) rounds in which each device sends one map (Blelloch 1990; Hillis and
Steele 1986); token t of the chunk then owes its local state (a_1 ... a_t) times the state before the chunk.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, Int

from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.linear_recurrence.api import check
from pallas_kernels.segments import check_ids

Ids = Int[Array, "2 batch"]
"""Segments of a chunk's first and last present token, -1 where it has none."""


class Summary(NamedTuple):
    """What a chunk of tokens does to the state."""

    factor: Inexact[Array, "batch *#channels"]
    term: Inexact[Array, "batch *channels"]
    ids: Ids

    def empty(self) -> "Summary":
        """A chunk without tokens."""
        return Summary(jnp.ones_like(self.factor), jnp.zeros_like(self.term), jnp.full_like(self.ids, -1))

    def after(self, before: "Summary") -> "Summary":
        """The two chunks as one."""
        connected = joined(before.ids, self.ids)
        factor = jnp.where(expand(connected, self.factor), self.factor * before.factor, 0)
        term = self.term + jnp.where(expand(connected, self.term), self.factor * before.term, 0)
        return Summary(factor, term, outer(before.ids, self.ids))


class Chunk(Protocol):
    """What is known of a chunk of tokens, such that two that follow each other make one."""

    def empty(self) -> Any:
        """A chunk without tokens."""

    def after(self, before: Any) -> Any:
        """The two chunks as one."""


AnyChunk = TypeVar("AnyChunk", bound=Chunk)


def context_scan(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "batch local_length *channels"],
    *,
    axis_name: str,
    layout: str = "contiguous",
    initial_state: Inexact[Array, "batch *channels"] | None = None,
    segment_ids: Int[Array, "batch local_length"] | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
    chunk: int | None = None,
) -> tuple[Inexact[Array, "batch local_length *channels"], Inexact[Array, "batch *channels"]]:
    """`linear_recurrence` of a sequence whose tokens are split over the mesh axis `axis_name`, in `jax.shard_map`.

    Every device gives its own part of `a`, `b` and `segment_ids` and gets its own part of the states; `initial_state`,
    that of the whole sequence, and the last state, also of the whole, are the same on all. `layout`: "contiguous", or
    "zigzag", whose two halves of a device are two chunks. Differentiable as often as `linear_recurrence`. Raises
    ValueError where arguments disagree, for another layout and for an odd local length with zigzag.
    """
    check(a, b, initial_state, chunk)
    check_ids(segment_ids, "b", b)
    parts = parts_of(layout, b.shape[1])
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    out_dtype = wide if jnp.iscomplexobj(a) else b.dtype
    a = a.reshape((1,) * (b.ndim - a.ndim) + a.shape)
    a = jnp.broadcast_to(a, (*b.shape[:2], *a.shape[2:])).astype(wide)
    decay, inputs = (x.reshape(-1, x.shape[1] // parts, *x.shape[2:]) for x in (a, b.astype(wide)))
    ids = None if segment_ids is None else segment_ids.reshape(inputs.shape[:2])
    scan = functools.partial(
        linear_recurrence, segment_ids=ids, reverse=reverse, implementation=implementation, chunk=chunk
    )
    local, term = scan(decay, inputs)
    kept, factor = scan(decay, jnp.zeros_like(decay), initial_state=jnp.ones_like(decay[:, 0]))
    ends = jnp.zeros((2, len(inputs)), jnp.int32) if ids is None else ends_of(ids, reverse)
    factor, term = (x.reshape(-1, parts, *x.shape[1:]) for x in (factor, term))
    summary = Summary(factor, term, ends.reshape(2, -1, parts))
    before, last = states_before(summary, axis_name=axis_name, initial_state=initial_state, reverse=reverse)
    states = local + kept * before.reshape(-1, 1, *before.shape[2:])
    return states.reshape(b.shape).astype(out_dtype), last


def parts_of(layout: str, length: int) -> int:
    """Chunks of a device; raises ValueError unless its tokens are chunks of neighbours."""
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f'layout={layout!r} has no chunks of neighbouring tokens: use "contiguous" or "zigzag"')
    if layout == "zigzag" and length % 2:
        raise ValueError(f"a zigzag shard is two equal parts: its length must be even, not {length}")
    return 2 if layout == "zigzag" else 1


def ends_of(ids: Int[Array, "batch length"], reverse: bool) -> Int[Array, "2 batch"]:
    """Segments of the first and the last present token in the order of the recurrence, -1 where there is none."""
    present = ids >= 0
    places = jnp.argmax(present, axis=1), ids.shape[1] - 1 - jnp.argmax(present[:, ::-1], axis=1)
    first, last = (jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0] for place in places)
    ends = jnp.stack([last, first] if reverse else [first, last])
    return jnp.where(present.any(1), ends, -1).astype(jnp.int32)


# ---- the exchange ----------------------------------------------------------------------------------------------------


def states_before(
    summary: Summary,
    *,
    axis_name: str,
    initial_state: Inexact[Array, "batch *channels"] | None = None,
    reverse: bool = False,
) -> tuple[Inexact[Array, "batch parts *channels"], Inexact[Array, "batch *channels"]]:
    """The states that the segments of this device's chunks begin with, and the last state of the whole sequence.

    The arrays of `summary` have an axis more, the device's chunks: `[batch, parts, ...]` and `[2, batch, parts]`. One
    chunk a device follows that of the device before; of two the first do, and the second ones come after all of these,
    from the last device to the first. Factors and states of any shape that broadcast, such as those of linear
    attention, whose state is a matrix.
    """
    batch, parts, *channels = summary.term.shape
    order = [(0, False), (1, True)][:parts]
    state = jnp.zeros((batch, *channels), summary.term.dtype) if initial_state is None else initial_state
    done: Summary | None = None
    found = {}
    for part, descending in [(part, not down) for part, down in order[::-1]] if reverse else order:
        mine = Summary(summary.factor[:, part], summary.term[:, part], summary.ids[..., part])
        before, whole = prefix(mine, axis_name, descending)
        before = before if done is None else before.after(done)
        found[part] = jnp.where(expand(joined(before.ids, mine.ids), state), before.factor * state + before.term, 0)
        done = whole if done is None else whole.after(done)
    assert done is not None
    return jnp.stack([found[part] for part in range(parts)], axis=1), done.factor * state + done.term


def prefix(x: AnyChunk, axis_name: str, descending: bool = False) -> tuple[AnyChunk, AnyChunk]:
    """What is known of all devices before this one, taken as one chunk, and of all devices."""
    devices = jax.lax.axis_size(axis_name)
    index = jax.lax.axis_index(axis_name)
    rank = devices - 1 - index if descending else index

    def from_before(x: AnyChunk, distance: int) -> AnyChunk:
        to = [(r, r + distance) for r in range(devices - distance)]
        steps = [(b, a) for a, b in to] if descending else to
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis_name, steps), x)

    def choose(there: Bool[Array, ""], yes: AnyChunk, no: AnyChunk) -> AnyChunk:
        return jax.tree.map(lambda a, b: jnp.where(there, a, b), yes, no)

    before = choose(rank >= 1, from_before(x, 1), x.empty()) if devices > 1 else x.empty()
    distance = 1
    while distance < devices - 1:
        further = before.after(from_before(before, distance))
        before = choose(rank > distance, further, before)
        distance *= 2
    last = choose(rank == devices - 1, x.after(before), jax.tree.map(jnp.zeros_like, x))
    return before, jax.tree.map(lambda leaf: jax.lax.psum(leaf, axis_name), last)


def joined(before: Ids, after: Ids) -> Bool[Array, " batch"]:
    """Whether the state passes from one chunk to the next: the segments that meet are one, or one chunk has none."""
    last, first = before[1], after[0]
    return (last == first) | (last < 0) | (first < 0)


def outer(before: Ids, after: Ids) -> Ids:
    """Those of the two chunks as one."""
    return jnp.stack([jnp.where(before[0] < 0, after[0], before[0]), jnp.where(after[1] < 0, before[1], after[1])])


def expand(x: Bool[Array, " batch"], like: Array) -> Array:
    """With as many axes as `like`."""
    return x.reshape(-1, *(1,) * (like.ndim - 1))
