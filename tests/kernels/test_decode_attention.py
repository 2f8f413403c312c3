"""Decode attention against jax.nn on the gathered cache, float64 loops and laws of paging."""

import contextlib
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._compat import absent_gpu, simulated_gpu, simulates_gpu
from pallas_kernels.decode_attention import decode_attention, xla
from pallas_kernels.decode_attention.cache import Blocks, Cache, Config
from pallas_kernels.decode_attention.registry import choose
from tests.evidence import evidence
from tests.kernels.simulated import simulated_tpu

CONFIGS = {"reference": None, "xla": Config(block_k=7)}
PLAIN = list(CONFIGS)
TOLERANCE = 3e-6  # float32 rounding of sums over at most 96 keys of size about 1


def paged(
    lengths, *, queries=1, heads=4, kv_heads=2, head_dim=16, value_dim=16, page_size=8, pages=6, dtype=np.float32
):
    """A query, and a cache of shuffled pages; what lies beyond the lengths is NaN, or a page that is not there."""
    rng = np.random.default_rng(0)
    batch = len(lengths)
    total = batch * pages + 3
    key = rng.standard_normal((total, page_size, kv_heads, head_dim)).astype(np.float32)
    value = rng.standard_normal((total, page_size, kv_heads, value_dim)).astype(np.float32)
    table = rng.permutation(total)[: batch * pages].reshape(batch, pages).astype(np.int32)
    used = np.zeros((total, page_size), bool)
    for b, length in enumerate(lengths):
        for p in range(length):
            used[table[b, p // page_size], p % page_size] = True
        table[b, -(-length // page_size) :] = np.resize([-7, 2**30, total, -1, 5], pages - -(-length // page_size))
    key[~used], value[~used] = np.nan, np.nan
    query = rng.standard_normal((batch, queries, heads, head_dim)).astype(np.float32)
    return [jnp.asarray(x) for x in (query, key, value, table, np.asarray(lengths, np.int32))]


def contiguous(pages, table, length):
    """One sequence's tokens, [1, length, kv_heads, dim]."""
    pages, table = np.asarray(pages), np.asarray(table)
    page_size = pages.shape[1]
    return np.stack([pages[table[p // page_size], p % page_size] for p in range(length)])[None]


def by_jax(query, key, value, table, lengths, **options):
    """The last queries of a full causal forward of jax.nn over each sequence alone."""
    rows = []
    for b, length in enumerate(np.asarray(lengths)):
        k, v = (jnp.asarray(contiguous(x, table[b], length)) for x in (key, value))
        queries = query.shape[1]
        full = jnp.concatenate([jnp.zeros((1, length - queries, *query.shape[2:]), query.dtype), query[b : b + 1]], 1)
        rows.append(jax.nn.dot_product_attention(full, k, v, is_causal=True, **options)[:, length - queries :])
    return jnp.concatenate(rows)


def by_loops(query, key, value, table, lengths, scale, cap=math.inf, left=math.inf, sinks=None):
    """(out, lse) by loops over sequences, queries, heads and keys, in float64."""
    query = np.asarray(query, np.float64)
    batch, queries, heads, _ = query.shape
    group = heads // key.shape[2]
    out, lse = np.zeros((batch, queries, heads, value.shape[-1])), np.full((batch, queries, heads), -np.inf)
    for b, t, n in np.ndindex(batch, queries, heads):
        at, scores, values = int(lengths[b]) - queries + t, [], []
        for p in range(max(0, at - left) if left < math.inf else 0, at + 1):
            where = (int(table[b, p // key.shape[1]]), p % key.shape[1], n // group)
            s = float(query[b, t, n] @ np.asarray(key[where], np.float64)) * scale
            scores.append(s if cap == math.inf else cap * math.tanh(s / cap))
            values.append(np.asarray(value[where], np.float64))
        if sinks is not None:
            scores.append(float(sinks[n]))
            values.append(np.zeros(value.shape[-1]))
        if scores:
            weights = np.exp(np.array(scores) - max(scores))
            out[b, t, n] = weights @ np.array(values) / weights.sum()
            lse[b, t, n] = max(scores) + math.log(weights.sum())
    return out, lse


def decode(*arrays, **options):
    return jax.jit(functools.partial(decode_attention, **options))(*arrays)


def worst(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    np.testing.assert_array_equal(np.isinf(a), np.isinf(b))
    return np.max(np.abs(np.where(np.isinf(a), 0, a) - np.where(np.isinf(b), 0, b)), initial=0)


@evidence("C15", oracle="jax.nn.dot_product_attention, last rows", code="pallas_kernels.decode_attention")
@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(("queries", "options"), [(1, {}), (3, {"local_window_size": (9, 0)})], ids=["full", "window"])
@pytest.mark.parametrize(("page_size", "pages"), [(8, 6), (5, 9), (48, 1)], ids=["paged", "odd", "contiguous"])
def test_is_the_last_rows_of_the_full_forward(implementation, queries, options, page_size, pages, evidence):
    arrays = paged([17, 45], queries=queries, page_size=page_size, pages=pages)
    left = {name: size[0] for name, size in options.items()}
    ours = decode(*arrays, implementation=implementation, config=CONFIGS[implementation], **left)
    evidence.record(worst(ours, by_jax(*arrays, **options)), TOLERANCE)


OPTIONS = {
    "plain": {},
    "soft_cap": {"logits_soft_cap": 3.0},
    "window": {"local_window_size": 6},
    "sinks": {"sinks": jnp.asarray([0.5, -1.0, 2.0, 0.0])},
    "all": {"logits_soft_cap": 3.0, "local_window_size": 6, "sinks": jnp.asarray([0.5, -1.0, 2.0, 0.0]), "scale": 0.7},
}


def against_loops(arrays, options, implementation, config=None):
    """The worst errors of output and lse."""
    out, lse = decode(*arrays, implementation=implementation, config=config, return_residual=True, **options)
    scale = options.get("scale", arrays[0].shape[-1] ** -0.5)
    names = {"logits_soft_cap": "cap", "local_window_size": "left", "sinks": "sinks"}
    wanted = by_loops(*arrays, scale, **{names[k]: v for k, v in options.items() if k in names})
    return max(worst(out, wanted[0]), worst(lse, wanted[1]))


@evidence("C15", oracle="explicit loops in float64, output and lse", code="pallas_kernels.decode_attention")
@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_agrees_with_loops(implementation, options, evidence):
    arrays = paged([0, 1, 2, 13, 24], queries=3, pages=3, value_dim=12)
    evidence.record(against_loops(arrays, options, implementation, CONFIGS[implementation]), TOLERANCE)


PARTS = {
    "pages": dict(page_size=8, pages=3, config=Config(16, 2, 3)),
    "part_of_a_page": dict(page_size=24, pages=1, config=Config(16, 2, 2)),
}
"""Blocks of several pages, and blocks of which the last overlaps the one before."""


@evidence("C15", oracle="explicit loops in float64, output and lse", code="pallas_kernels.decode_attention.tpu")
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("parts", PARTS)
def test_tpu_kernel_agrees_with_loops_and_has_no_race(parts, options, evidence):
    cut = dict(PARTS[parts])
    config = cut.pop("config")
    arrays = paged([0, 2, 13, 24], queries=3, value_dim=12, **cut)
    with simulated_tpu():
        error = against_loops(arrays, OPTIONS[options], "tpu", config)
    evidence.record(error, TOLERANCE)


HALF = 2**-9
"""Relative rounding of bfloat16: of the weights, and of outputs of size at most about 3."""


@pytest.mark.skipif(not simulates_gpu(), reason="jax older than 0.11 does not simulate Mosaic GPU kernels")
@evidence("C15", oracle="explicit loops in float64, output and lse", code="pallas_kernels.decode_attention.hopper")
@pytest.mark.parametrize(
    ("page_size", "pages", "options", "splits", "dims"),
    [(64, 4, "sinks", 1, (192, 128)), (72, 4, "soft_cap", 2, (64, 64)), (16, 16, "all", 3, (64, 64))],
    ids=["page", "part_of_a_page", "pages"],
)
def test_hopper_kernel_agrees_with_loops_and_has_no_race(page_size, pages, options, splits, dims, evidence):
    arrays = paged([0, 70, 250], queries=3, head_dim=dims[0], value_dim=dims[1], page_size=page_size, pages=pages)
    arrays = [x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in arrays]
    with simulated_gpu():
        error = against_loops(arrays, OPTIONS[options], "hopper", Config(64, splits, 2))
    evidence.record(error, 6 * HALF)


@pytest.mark.parametrize("implementation", [*PLAIN, "tpu"])
def test_pages_may_lie_anywhere(implementation):
    """Another order of the pages changes no bit."""
    query, key, value, table, lengths = paged([5, 24], pages=3)
    order = np.random.default_rng(1).permutation(len(key))
    place = jnp.asarray(np.argsort(order).astype(np.int32))
    moved = jnp.where((table >= 0) & (table < len(key)), place[jnp.clip(table, 0, len(key) - 1)], table)
    with simulated_tpu() if implementation == "tpu" else contextlib.nullcontext():
        one = decode(query, key, value, table, lengths, implementation=implementation)
        other = decode(query, key[order], value[order], moved, lengths, implementation=implementation)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", PLAIN)
def test_several_queries_are_several_calls(implementation):
    query, key, value, table, lengths = paged([9, 24, 17], queries=3, pages=3)
    together = decode(query, key, value, table, lengths, local_window_size=5, implementation=implementation)
    for t in range(3):
        alone = decode(
            *(query[:, t], key, value, table, lengths - 2 + t), local_window_size=5, implementation=implementation
        )
        assert worst(together[:, t], alone) <= TOLERANCE


def test_a_nan_stays_in_its_sequence():
    query, key, value, table, lengths = paged([9, 24], pages=3)
    key = key.at[table[0, 0], 3].set(jnp.nan)
    out, lse = decode(query, key, value, table, lengths, return_residual=True)
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0]).all()
    chex.assert_tree_all_finite((out[1], lse[1]))


@evidence("C15", oracle="jax.nn.dot_product_attention in bfloat16", code="pallas_kernels.decode_attention")
@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_bfloat16_is_as_exact_as_xla(implementation, evidence):
    """RMS errors of output and lse against float64, at most 1.3 times those of jax.nn in the same precision."""
    wide = paged([96, 96], heads=8, head_dim=64, value_dim=64, page_size=32, pages=3)
    arrays = [x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in wide]
    exact = by_loops(*(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays), 1 / 8)
    with simulated_tpu() if implementation == "tpu" else contextlib.nullcontext():
        ours = decode(*arrays, return_residual=True, implementation=implementation)
    key, value = (jnp.concatenate([contiguous(x, t, 96) for t in arrays[3]]) for x in arrays[1:3])
    theirs = jax.nn.dot_product_attention(arrays[0], key, value, return_residual=True)
    for got, other, truth in zip(ours, theirs, exact, strict=True):
        rms = [np.sqrt(np.mean((np.asarray(x, np.float64) - truth) ** 2)) for x in (got, other)]
        evidence.record(rms[0], 1.3 * rms[1])


@pytest.mark.slow
def test_xla_reads_only_what_is_seen(monkeypatch):
    """Blocks that are gathered: those of the longest length, or of the widest window."""
    calls = []
    fetch = xla.fetch
    monkeypatch.setattr(xla, "fetch", lambda *a: calls.append(1) or fetch(*a))
    arrays = paged([3, 33], pages=6)
    for window, blocks in ((None, 5), (9, 2)):
        calls.clear()
        with jax.disable_jit():
            decode_attention(*arrays, local_window_size=window, implementation="xla", config=Config(block_k=8))
        assert len(calls) == 2 * blocks


def test_xla_memory_is_that_of_a_block():
    """Temporary bytes do not grow with the cache."""

    def temporary(pages):
        cache = jax.ShapeDtypeStruct((2 * pages, 64, 2, 32), jnp.float32)
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, pages), (2,))]
        f = jax.jit(functools.partial(decode_attention, implementation="xla"))
        query = jax.ShapeDtypeStruct((2, 1, 4, 32), jnp.float32)
        return f.lower(query, cache, cache, *ints).compile().memory_analysis().temp_size_in_bytes

    assert temporary(128) < 1.1 * temporary(16) < 2 * 64 * 2 * 32 * 4 * 128


SHAPES = {"query": (2, 1, 4, 16), "key_pages": (9, 8, 2, 16), "value_pages": (9, 8, 2, 16), "page_table": (2, 3)}


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"query": (2, 1, 4, 8)}, {}, r"query has shape \(2, 1, 4, 8\), key_pages \(9, 8, 2, 16\): head_dim"),
        ({"query": (2, 1, 5, 16)}, {}, r"query has shape \(2, 1, 5, 16\), key_pages \(9, 8, 2, 16\): kv heads"),
        ({"query": (2, 17, 4, 16)}, {}, r"query has shape \(2, 17, 4, 16\): 1 to 16 queries"),
        ({"value_pages": (9, 4, 2, 16)}, {}, r"key_pages has shape \(9, 8, 2, 16\), value_pages \(9, 4, 2, 16\)"),
        ({"key_pages": (9, 2, 16)}, {}, r"key_pages has shape \(9, 2, 16\)"),
        ({"page_table": (3, 3)}, {}, r"page_table has shape \(3, 3\), query \(2, 1, 4, 16\)"),
        ({"lengths": (3,)}, {}, r"lengths has shape \(3,\), query \(2, 1, 4, 16\)"),
        ({}, {"sinks": jnp.zeros(3)}, r"sinks has shape \(3,\), query \(2, 1, 4, 16\)"),
        ({}, {"lengths": jnp.zeros(2)}, r"lengths of shape \(2,\) has dtype float32"),
        ({}, {"key_pages": jnp.zeros((9, 8, 2, 16), jnp.int8)}, "float32, int8, float32"),
        ({}, {"local_window_size": -1}, "local_window_size=-1"),
        ({}, {"logits_soft_cap": 0.0}, "logits_soft_cap=0.0"),
        ({}, {"config": Config(block_k=0)}, "config.block_k=0"),
        ({}, {"implementation": "fast"}, "'fast' is unknown: use one of hopper, reference, tpu, xla"),
    ],
)
def test_bad_input_is_named(shapes, options, message):
    shapes = SHAPES | {"lengths": (2,)} | shapes
    arrays = {n: jnp.zeros(s, jnp.int32 if n in ("page_table", "lengths") else jnp.float32) for n, s in shapes.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: decode_attention(**(arrays | options)))


def refused(name, message, dtype=jnp.bfloat16, page=(16, 8, 128), entries=4, config=None):
    arrays = [jnp.zeros((1, 8, page[2]), dtype), *[jax.ShapeDtypeStruct((4, *page), dtype)] * 2]
    arrays += [jax.ShapeDtypeStruct((1, entries), jnp.int32), jnp.zeros(1, jnp.int32)]
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(decode_attention, implementation=name, config=config), *arrays)


def test_refusals_say_why():
    refused("tpu", '"tpu" does not run on cpu')
    refused("reference", "has no block sizes", config=Config(block_k=8))
    refused("xla", "has no splits", config=Config(splits=2))
    with simulated_tpu():
        refused("tpu", "takes bfloat16 and float32, not float16", jnp.float16)
        refused("tpu", "multiple of 16 rows, not 4 tokens of 2 kv heads", page=(4, 2, 128))
        refused("tpu", "multiple of 8 kv heads, not 2", page=(16, 2, 256))
        refused("tpu", "at most 131072 entries", entries=2**18)
        refused(("hopper", "tpu"), "hopper. does not run on TPU v5 lite; .*tpu. takes bfloat16", jnp.float16)
    with absent_gpu():
        refused("hopper", "takes bfloat16 and float16, not float32", jnp.float32)
        refused("hopper", "head dims .*, not 80 and 80", page=(16, 8, 80))
        refused("hopper", "pages of 8, 16, 32", page=(24, 8, 128))
        refused("hopper", "no room for 9 blocks of 64 keys", config=Config(stages=9))


def test_platform_chooses_the_implementation():
    arrays = paged([5, 24], pages=3)

    def chosen(names=None):
        query, *cache = arrays
        return choose(names, query[:, :1], Cache(*cache), Config()).__name__.rpartition(".")[2]

    assert chosen() == "xla"
    with simulated_tpu():
        assert chosen() == "tpu"
    with absent_gpu():
        assert chosen(("hopper", "xla")) == "xla"  # float32 is not for the Hopper kernel
        arrays = [
            x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in paged([5], head_dim=64, value_dim=64)
        ]
        assert chosen() == "xla"  # no chip has run the Hopper kernel
        assert chosen(("hopper", "xla")) == "hopper"


@pytest.mark.parametrize(("page_size", "at_most", "pages"), [(8, 20, 5), (20, 8, 3), (16, 16, 4), (24, 8, 2)])
@pytest.mark.parametrize("parts", [1, 3])
def test_blocks_hold_every_position_once(page_size, at_most, pages, parts):
    """The blocks of all shares hold positions first to stop - 1 as their own, each once, inside their pages."""
    blocks = Blocks.of(page_size, at_most)
    for first, stop in ((0, page_size * pages), (3, 4), (5, page_size * pages - 1), (7, 7)):
        owned = []
        for part in range(parts):
            begin, end = blocks.share(jnp.int32(first), jnp.int32(stop), part, parts)
            for block in range(int(begin), int(end)):
                row0, own = (int(x) for x in blocks.span(jnp.int32(block)))
                assert blocks.copies > 1 or row0 // page_size == (row0 + blocks.size - 1) // page_size
                owned += range(own, row0 + blocks.size)
        assert sorted(p for p in owned if first <= p < stop) == list(range(first, stop))
