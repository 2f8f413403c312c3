"""Attention split over eight fake devices against attention of the whole; hops, work and memory counted."""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention, tpu_blocks
from pallas_kernels.attention.tiled import Config
from pallas_kernels.ring_attention import (
    choose,
    from_layout,
    positions_of,
    registry,
    ring_attention,
    sharded_ring_attention,
    to_layout,
    ulysses_attention,
    xla,
)
from tests.evidence import evidence
from tests.kernels.oracle import visible

pytestmark = pytest.mark.devices(8)

LAYOUTS = ("zigzag", "striped", "contiguous")
TOLERANCE = 1e-5  # float32 rounding of sums over at most 32 terms, as a part of the largest number
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 32, 4, 2, 8, 6
PACKED = np.array([[0] * 10 + [1] * 7 + [2] * 12 + [-1] * 3, [3] * 3 + [4] * 29], np.int32)
LATER = np.arange(LENGTH)[None] * 3 + np.array([[0], [5]])


def mesh(**axes):
    count = math.prod(axes.values())
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:count])


def inputs(kv_heads=KV_HEADS):
    rng = np.random.default_rng(0)
    shapes = [(HEADS, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, VALUE_DIM)]
    arrays = [rng.standard_normal((BATCH, LENGTH, *shape)).astype(np.float32) for shape in shapes]
    return [*arrays, np.linspace(-1, 2, HEADS, dtype=np.float32)]


def weights():
    rng = np.random.default_rng(1)
    shapes = [(BATCH, LENGTH, HEADS, VALUE_DIM), (BATCH, LENGTH, HEADS)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def with_gradients(function, arrays, through_lse=True):
    """Output, log-sum-exp and the gradients, of a random sum of the first or of both, of every array."""

    def loss(*arrays):
        out, lse = function(*arrays)
        known = jnp.where(lse > -jnp.inf, lse, 0) * through_lse
        return sum(jnp.sum(w * x) for w, x in zip(weights(), (out, known))), (out, lse)

    run = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))
    (_, results), gradients = run(*arrays)
    return [np.asarray(x) for x in (*results, *gradients)]


def worst(got, expected):
    """The largest difference as a part of the largest number of its array; what is infinite must be so in both."""
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b))
    pairs = [(np.where(np.isinf(a), 0, a), np.where(np.isinf(b), 0, b)) for a, b in zip(got, expected)]
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3)) for a, b in pairs)


def split(function, shards, layout, axis="ring", check=True, **arrays):
    """`function` of this device's tokens as a function of whole arrays in the order of the tokens."""
    specs = (P(None, axis),) * 3 + (P(),)
    names = [name for name, x in arrays.items() if x is not None]

    def local(q, k, v, sinks, *ids):
        return function(q, k, v, sinks=sinks, **dict(zip(names, ids)))

    def whole(*inputs):
        q, k, v, sinks = (*inputs, None)[:4]
        over = mesh(ring=shards) if isinstance(axis, str) else mesh(ring=shards, heads=8 // shards)
        ids = [jnp.asarray(arrays[name]) for name in names]
        placed = [to_layout(x, shards, layout) for x in (q, k, v, *ids)]
        run = jax.shard_map(
            local, mesh=over, in_specs=(*specs, *specs[: len(ids)]), out_specs=specs[:2], check_vma=check
        )
        results = run(*placed[:3], sinks, *placed[3:])
        return tuple(from_layout(x, shards, layout) for x in results)

    return whole


def ring(shards, layout, check=True, segment_ids=None, positions=None, **options):
    options |= {"axis_name": "ring", "layout": layout, "return_residual": True}
    function = functools.partial(ring_attention, **options)
    return split(function, shards, layout, check=check, segment_ids=segment_ids, positions=positions)


def library(q, k, v, segment_ids=None, positions=None, is_causal=False, local_window_size=(None, None)):
    """`jax.nn`'s function with a mask made in numpy and values widened by zeros; rows without keys give 0.

    Its log-sum-exp has no gradient.
    """
    where, ids = ((x, x) if x is not None else None for x in (positions, segment_ids))
    seen = visible(BATCH, (LENGTH, LENGTH), is_causal, local_window_size, where, ids)
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, HEAD_DIM - VALUE_DIM)))
    out, lse = jax.nn.dot_product_attention(q, k, wide, mask=jnp.asarray(seen)[:, None], return_residual=True)
    some = jnp.asarray(seen.any(-1))[..., None]
    return jnp.where(some[..., None], out[..., :VALUE_DIM], 0), jnp.where(some, lse, -jnp.inf)


def reference(q, k, v, sinks=None, **options):
    options |= {"return_residual": True, "implementation": "reference"}
    return attention(q, k, v, sinks=sinks, **options)


CASES = {
    "full": {},
    "causal": {"is_causal": True},
    "packed": {"is_causal": True, "segment_ids": PACKED},
    "window": {"is_causal": True, "local_window_size": (9, 0)},
    "two-sided": {"local_window_size": (5, 3), "segment_ids": PACKED},
    "positions": {"is_causal": True, "positions": LATER, "local_window_size": (20, 0)},
}
BENT = {"is_causal": True, "logits_soft_cap": 2.0, "segment_ids": PACKED}
QUICK = [("packed", 8, "zigzag", True), ("window", 4, "contiguous", False)]
EVERY = [
    pytest.param(*case, True, marks=pytest.mark.long)
    for case in itertools.product(CASES, (1, 2, 4, 8), LAYOUTS)
    if case not in [quick[:3] for quick in QUICK]
]


@evidence("C04", oracle="jax.nn.dot_product_attention on one device", code="pallas_kernels.ring_attention")
@evidence("C05", oracle="jax.nn.dot_product_attention on one device", code="pallas_kernels.ring_attention.layout")
@pytest.mark.parametrize(("case", "shards", "layout", "check"), [*QUICK, *EVERY])
def test_a_ring_is_attention_of_the_whole(case, shards, layout, check, evidence):
    """Output, log-sum-exp and gradients of grouped heads whose keys and values differ in size."""
    options = CASES[case]
    functions = ring(shards, layout, check, **options), functools.partial(library, **options)
    got, expected = (with_gradients(f, inputs()[:3], through_lse=False) for f in functions)
    evidence.record(worst(got, expected), TOLERANCE)


@evidence("C04", oracle="the definition on one device, float32", code="pallas_kernels.ring_attention")
@pytest.mark.parametrize(
    ("shards", "layout", "check"),
    [
        (4, "zigzag", False),
        *(pytest.param(n, name, True, marks=pytest.mark.long) for n in (1, 8) for name in LAYOUTS),
    ],
)
def test_sinks_and_cap(shards, layout, check, evidence):
    """A sink is one score of the whole row, not one of every shard; its gradient is summed over the devices."""
    got = with_gradients(ring(shards, layout, check, **BENT), inputs())
    evidence.record(worst(got, with_gradients(functools.partial(reference, **BENT), inputs())), TOLERANCE)


@evidence("C04", oracle="the definition on one device, float32", code="pallas_kernels.ring_attention")
def test_whole_arrays_over_a_mesh_of_three_axes(evidence):
    """Batch, length and heads split two ways each; gradients flow through from outside, also to the sinks."""
    spec = P("data", "context", "tensor")

    def whole(q, k, v, sinks):
        q, k, v, ids = (to_layout(x, 2) for x in (q, k, v, PACKED))
        options = BENT | {"mesh": mesh(data=2, context=2, tensor=2), "spec": spec, "sinks": sinks, "segment_ids": ids}
        results = sharded_ring_attention(q, k, v, return_residual=True, **options)
        return tuple(from_layout(x, 2) for x in results)

    got, expected = (with_gradients(f, inputs()) for f in (whole, functools.partial(reference, **BENT)))
    evidence.record(worst(got, expected), TOLERANCE)


@evidence("C04", oracle="the definition on one device, float32", code="pallas_kernels.ring_attention.ulysses")
@pytest.mark.parametrize(
    ("shards", "layout", "over", "kv_heads"),
    [
        (4, "striped", "ring", 2),
        pytest.param(4, "contiguous", "ring", 4, marks=pytest.mark.matrix),
        pytest.param(2, "zigzag", ("ring", "heads"), 2, marks=pytest.mark.matrix),
    ],
)
def test_heads_exchanged_for_length(shards, layout, over, kv_heads, evidence):
    """Ulysses with more devices than key heads, with a device each, and four ways inside a ring of two."""
    axes = {"axis_name": over} if over == "ring" else {"axis_name": "heads", "ring_axis": "ring"}
    options = {name: x for name, x in BENT.items() if name != "segment_ids"}
    function = functools.partial(ulysses_attention, layout=layout, return_residual=True, **options, **axes)
    got = with_gradients(split(function, shards, layout, over, segment_ids=PACKED), inputs(kv_heads))
    expected = with_gradients(functools.partial(reference, **BENT), inputs(kv_heads))
    evidence.record(worst(got, expected), TOLERANCE)


@evidence("C04", oracle="the definition on one device, float32", code="pallas_kernels.ring_attention.tpu")
@pytest.mark.matrix
@pytest.mark.parametrize(("layout", "extras"), [("zigzag", BENT), ("contiguous", {"local_window_size": (150, 40)})])
def test_kernels_on_simulated_tpus(layout, extras, monkeypatch, evidence):
    """The softmax carried through the TPU kernels of two devices; memories start as NaN, and a race fails."""
    length, shards = 512, 2
    rng = np.random.default_rng(2)
    shapes = [(length, heads, dim) for heads, dim in ((2, 64), (1, 64), (1, 32), (2, 32))]
    *arrays, weight = (rng.standard_normal((1, *shape)).astype(np.float32) for shape in shapes)
    packed = "segment_ids" in extras
    ids = np.repeat([0, 1, 2, -1], [100, 300, 80, 32])[None].astype(np.int32) if packed else None
    options = extras | {"segment_ids": ids, "sinks": np.array([0.5, -1], np.float32) if packed else None}
    tpu = dataclasses.replace(registry.BACKENDS["tpu"], runs_on=registry.everywhere)
    monkeypatch.setitem(registry.BACKENDS, "tpu", tpu)

    def over_devices(*arrays):
        config = tpu_blocks.Config(128, 128, 128, 128, 128, 128, 128)
        placed = [to_layout(x, shards, layout) for x in arrays]
        split = options | {"segment_ids": to_layout(ids, shards, layout) if packed else None, "layout": layout}
        split |= {"spec": P(None, "ring"), "mesh": mesh(ring=shards), "config": config, "implementation": "tpu"}
        return from_layout(sharded_ring_attention(*placed, **split), shards, layout)

    def results(function):
        loss = lambda *arrays: (jnp.sum(weight * (out := function(*arrays))), out)
        return jax.block_until_ready(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays))

    interpret_pallas_call.races = None
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        got = results(over_devices)
    assert interpret_pallas_call.races is not None, "no kernel was simulated"
    assert not interpret_pallas_call.races.races_found
    expected = results(functools.partial(attention, implementation="reference", **options))
    evidence.record(worst(*(jax.tree.leaves(jax.tree.map(np.asarray, x)) for x in (got, expected))), TOLERANCE)


# ---- hops ------------------------------------------------------------------------------------------------------------


def sends(jaxpr, times=1):
    """(executions, operands that a loop's body has from the start) of every permute in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            yield times, all(x in jaxpr.invars for x in equation.invars)
        for value in equation.params.values():
            inner = [getattr(x, "jaxpr", x) for x in (value if isinstance(value, tuple) else (value,))]
            trips = equation.params["length"] if equation.primitive.name == "scan" else 1
            for program in inner:
                if hasattr(program, "eqns"):
                    yield from sends(program, times * trips)


def permutes(function, shards):
    return list(sends(jax.make_jaxpr(function)(*inputs()[:3]).jaxpr))


@evidence("C04", oracle="counting: shards - 1, or what a window reaches", code="pallas_kernels.ring_attention")
@pytest.mark.parametrize(
    ("shards", "options", "hops"),
    [
        *((shards, {"layout": "zigzag"}, shards - 1) for shards in (1, 2, 4, 8)),
        *(
            (8, {"layout": "contiguous", "local_window_size": (left, 0)}, hops)
            for left, hops in ((0, 0), (4, 1), (5, 2))
        ),
        (8, {"layout": "contiguous", "local_window_size": (100, 0)}, 7),
        (8, {"layout": "striped", "local_window_size": (4, 0)}, 7),
    ],
)
def test_keys_are_sent_on_no_more_often_than_needed(shards, options, hops, evidence):
    """One permute in the loop whatever the number of shards, of what the body is given: it waits for no work."""
    found = permutes(ring(shards, is_causal=True, **options), shards)
    evidence.record(abs(sum(times for times, _ in found) - hops), 0)
    assert len(found) == (hops > 0)
    assert all(ready for _, ready in found)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_gradients_follow_their_keys_and_go_home(shards):
    """Keys go around once more; their gradients before every hop but the first, counted with it, and home."""
    function = ring(shards, "zigzag", is_causal=True)
    gradient = jax.grad(lambda *arrays: jnp.sum(function(*arrays)[0]), argnums=(0, 1, 2))
    found = permutes(gradient, shards)
    assert sum(times for times, _ in found) == (0 if shards == 1 else 3 * (shards - 1) + 2)
    loops = [ready for times, ready in found if times == shards - 1]
    assert shards < 8 or loops == [True] * 3


# ---- work ------------------------------------------------------------------------------------------------------------


def tiles_visited(monkeypatch, layout, segments=None, length=128, block=2):
    """How many tiles of scores each of eight shards computes in a forward pass, counted as it runs."""
    counts = collections.Counter()
    computed = xla.score

    def counting(*arguments):
        jax.debug.callback(lambda shard: counts.update([int(shard)]), jax.lax.axis_index("ring"))
        return computed(*arguments)

    monkeypatch.setattr(xla, "score", counting)
    x = np.ones((1, length, 1, 1), np.float32)
    ids = None if segments is None else to_layout(segments, 8, layout)
    options = {"is_causal": True, "layout": layout, "config": Config(block, block), "segment_ids": ids}
    run = functools.partial(sharded_ring_attention, spec=P(None, "ring"), mesh=mesh(ring=8), **options)
    jax.block_until_ready(jax.jit(run)(x, x, x))
    jax.effects_barrier()
    return [counts[shard] for shard in range(8)]


@evidence("C05", oracle="closed form of the tiles at or below the diagonal", code="pallas_kernels.ring_attention.xla")
@pytest.mark.parametrize("layout", ["zigzag", pytest.param("striped", marks=pytest.mark.matrix)])
def test_causal_work_is_balanced(layout, monkeypatch, evidence):
    """Eight tiles a shard and side: the busiest of eight shards does what all do on average."""
    found = tiles_visited(monkeypatch, layout)
    halves, whole = 4**2 * (2 * 8 - 1) + 4 * 5, 8 * (8 * 9 // 2)
    assert found == [halves if layout == "zigzag" else whole] * 8
    evidence.record(max(found) / np.mean(found), 1.03)


def test_causal_work_of_contiguous_shards_is_not(monkeypatch):
    """Shard r works on r whole shards of keys and on its own triangle: the last on 1.86 times the mean."""
    assert tiles_visited(monkeypatch, "contiguous") == [8**2 * shard + 8 * 9 // 2 for shard in range(8)]


def test_shards_without_a_common_segment_pass_keys_on_unread(monkeypatch):
    """A document for every shard: each works on its own triangle of tiles alone."""
    documents = np.repeat(np.arange(8), 16)[None]
    assert tiles_visited(monkeypatch, "contiguous", documents) == [8 * 9 // 2] * 8


@evidence("C04", oracle="XLA's memory analysis", code="pallas_kernels.ring_attention")
@pytest.mark.matrix
def test_memory_of_a_device_is_flat(evidence):
    """Four times the tokens on four times the devices: the gradient takes what it took, up to the ids of devices."""

    def temporary(shards):
        over = mesh(ring=shards)
        sharding = NamedSharding(over, P(None, "ring"))
        x = jax.ShapeDtypeStruct((1, 256 * shards, 2, 16), jnp.float32, sharding=sharding)
        options = {"spec": P(None, "ring"), "mesh": over, "is_causal": True, "config": Config(32, 32)}
        loss = lambda *arrays: jnp.sum(jnp.square(sharded_ring_attention(*arrays, **options)))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    before, after = temporary(2), temporary(8)
    assert before < 256**2 * 4 * 2 * 2  # less than the scores of one shard with itself, forward and backward
    evidence.record(after / before, 1.01)


# ---- layouts, choice, bad input --------------------------------------------------------------------------------------


@evidence("C05", oracle="the layouts written out", code="pallas_kernels.ring_attention.layout")
def test_layouts(evidence):
    """Tokens of two shards of four, whatever kind of array and axis; and back."""
    tokens = np.arange(8)
    expected = {
        "contiguous": [0, 1, 2, 3, 4, 5, 6, 7],
        "striped": [0, 2, 4, 6, 1, 3, 5, 7],
        "zigzag": [0, 1, 6, 7, 2, 3, 4, 5],
    }
    wrong = 0
    for layout, order in expected.items():
        for x in (tokens[None], jnp.asarray(tokens)[None]):
            placed = to_layout(x, 2, layout)
            assert isinstance(placed, type(x))
            wrong += int(np.sum(placed[0] != np.array(order)) + np.sum(from_layout(placed, 2, layout) != x))
        wrong += int(np.sum(to_layout(tokens[:, None], 2, layout, axis=0)[:, 0] != np.array(order)))
        held = jax.jit(positions_of, static_argnums=(1, 2, 3))(1, 2, 4, layout)
        wrong += int(np.sum(held != np.array(order[4:])))
    evidence.record(wrong, 0)


def test_choice_between_ring_and_exchange():
    """Long sequences hide a ring; short ones with many heads are exchanged; heads that cannot be split are not."""
    options = {"flops_per_byte": 4300.0}
    assert (choose(32, 8, 2**20, 8, **options).ring, choose(32, 8, 2**20, 8, **options).ulysses) == (8, 1)
    short = choose(64, 64, 512, 8, **options)
    assert short.ulysses > 1
    assert short.reasons[0].startswith(f"ring {short.ring} x Ulysses {short.ulysses}:")
    odd = choose(7, 7, 512, 8, **options)
    assert odd.ring == 8
    assert sum("7 heads are not divided" in reason for reason in odd.reasons) == 3
    assert "1 hops" in choose(32, 8, 65536, 8, window=4096, **options).reasons[0]


def test_bad_arguments_are_named():
    """Each message names the argument and what was expected."""
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="layout='spiral' is unknown"):
        to_layout(q, 2, "spiral")
    with pytest.raises(ValueError, match="5 shards do not divide the length 32"):
        to_layout(q, 5, "striped")
    with pytest.raises(ValueError, match="must be even, not 3"):
        to_layout(q[:, :6], 2, "zigzag")
    with pytest.raises(ValueError, match="5 shards do not divide the length 32"):
        choose(8, 8, 32, 5, flops_per_byte=1.0)
    run = functools.partial(sharded_ring_attention, spec=P(None, "ring"), mesh=mesh(ring=2))
    with pytest.raises(ValueError, match="shards of both must have the same length"):
        run(q, k[:, :16], v[:, :16])
    with pytest.raises(ValueError, match="sinks have shape"):
        run(q, k, v, sinks=jnp.zeros(3))
    with pytest.raises(ValueError, match="logits_soft_cap=0 must be positive"):
        run(q, k, v, logits_soft_cap=0)
    exchange = functools.partial(ulysses_attention, axis_name="ring")
    with pytest.raises(ValueError, match="4 heads are not divided by 8 devices"):
        split(exchange, 8, "contiguous")(q, k, v)
