"""Recurrences split over eight fake devices against the recurrence of the whole, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.context_scan import context_scan
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.ring_attention import from_layout, to_layout
from tests.evidence import evidence
from tests.kernels.recurrence import with_gradients

pytestmark = pytest.mark.devices(8)

LENGTH, WIDTH = 32, 3
TOLERANCE = 1e-5  # float32 rounding of at most 32 steps, as a part of the largest number
# Segments that end in a shard, with it, or cross several; shards of absent tokens alone; absent tokens first and last.
PACKED = np.array(
    [
        [-1] * 3 + [7] * 9 + [-1] * 8 + [7] * 3 + [2] * 8 + [-1],
        [1] * 8 + [2] * 1 + [3] * 20 + [4] * 3,
        [0] * 16 + [-1] * 16,
    ],
    np.int32,
)


def inputs(whole):
    rng = np.random.default_rng(0)
    shape = (*PACKED.shape, 1 if whole else WIDTH)
    a, b = rng.uniform(0.3, 1.2, shape), rng.standard_normal((*PACKED.shape, WIDTH))
    return [x.astype(np.float32) for x in (a, b, rng.standard_normal((len(PACKED), WIDTH)))]


def over(shards):
    return jax.make_mesh((shards,), ("ring",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])


def split(shards, layout, ids=None, **options):
    local, whole = P(None, "ring"), P()

    def run(a, b, state, ids):
        return context_scan(a, b, axis_name="ring", layout=layout, initial_state=state, segment_ids=ids, **options)

    specs = (local, local, whole, None if ids is None else local)
    function = jax.shard_map(run, mesh=over(shards), in_specs=specs, out_specs=(local, whole))

    def arranged(a, b, state):
        a, b, marks = (None if x is None else to_layout(x, shards, layout) for x in (a, b, ids))
        states, last = function(a, b, state, marks)
        return from_layout(states, shards, layout), last

    return arranged


CASES = [(8, "zigzag", True, False), (4, "contiguous", False, True)]
EVERY = [
    pytest.param(*case, marks=pytest.mark.long)
    for case in [
        (n, layout, packed, packed) for n in (1, 2, 8) for layout in ("zigzag", "contiguous") for packed in (0, 1)
    ]
]


@evidence("C08", oracle="the recurrence on one device, token by token", code="pallas_kernels.context_scan")
@pytest.mark.parametrize(("shards", "layout", "packed", "reverse"), [*CASES, *EVERY])
def test_chunks_on_devices_are_the_recurrence(shards, layout, packed, reverse, evidence):
    """All states, the last one and gradients of decays, inputs and the initial state."""
    ids = PACKED if packed else None
    options = {"reverse": bool(reverse)}
    arrays = inputs(whole=not packed)
    reference = functools.partial(linear_recurrence, segment_ids=ids, implementation="reference", **options)
    got = with_gradients(split(shards, layout, ids, **options))(*arrays)
    expected = with_gradients(lambda a, b, state: reference(a, b, initial_state=state))(*arrays)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    evidence.record(max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs), TOLERANCE)


@pytest.mark.parametrize(("shards", "rounds"), [(1, 0), (2, 1), (4, 3), (8, 4)])
def test_rounds_grow_with_the_logarithm(shards, rounds):
    """Three arrays a round: factor, term and segments."""
    text = str(jax.make_jaxpr(split(shards, "contiguous"))(*inputs(whole=True)))
    assert text.count("ppermute[") == 3 * rounds


def test_bad_arguments_are_named():
    a, b, state = inputs(whole=True)
    with pytest.raises(ValueError, match="'striped' has no chunks of neighbouring tokens"):
        split(2, "striped")(a, b, state)
    with pytest.raises(ValueError, match="must be even, not 1"):
        context_scan(a[:, :1], b[:, :1], axis_name="ring", layout="zigzag")
