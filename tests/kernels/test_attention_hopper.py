"""The Hopper attention kernels on a simulated GPU, with races detected, against XLA and its gradients in float64.

The simulation runs warpgroups, copies, barriers and shared memory as the kernel asks for them; a product of two
matrices is numpy's, so registers, layouts and the asynchrony of products are the hardware tests' matter.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels._compat import absent_gpu, simulated_gpu, simulates_gpu
from pallas_kernels.attention import hopper, hopper_blocks
from pallas_kernels.attention.mask import Rule, Seen, allowed, ends
from pallas_kernels.chips import target
from tests.evidence import evidence

simulated = pytest.mark.skipif(not simulates_gpu(), reason="jax older than 0.11 cannot simulate Mosaic GPU kernels")
WORSE = 1.3
"""times XLA's own error in the same precision, in root mean squares"""
LARGEST = 2e-6
"""error of a log-sum-exp, float32 in any dtype: roundings of numbers of up to 8, and of the sums of scores"""


def plain(q, k, v, sinks, seen, rule):
    """All scores at once in XLA, weights in the dtype of `v`: (output, log-sum-exp)."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    scores = scores * rule.scale
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    mask = allowed(rule, ends(seen, (q.shape[1], k.shape[1])))[:, None]
    scores = jnp.where(mask, scores, -1e30)
    sink = jnp.full(q.shape[2], -1e30) if sinks is None else sinks
    every = jnp.concatenate([scores, jnp.broadcast_to(sink[None, :, None, None], (*scores.shape[:3], 1))], -1)
    lse = jax.nn.logsumexp(every, -1)
    weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0).astype(v.dtype)
    return jnp.einsum("bnts,bsnd->btnd", weights, v), lse


def with_gradients(dtype, operands, d_out, sinks, seen, rule):
    """Output, log-sum-exp and the gradients of query, key and value of `plain` in one dtype."""
    cast = [jnp.asarray(x, dtype) for x in operands]
    (out, lse), gradient = jax.vjp(lambda q, k, v: plain(q, k, v, sinks, seen, rule), *cast)
    return out, lse, *gradient((d_out.astype(out.dtype), jnp.zeros_like(lse)))


def rms(found, wanted, where=...):
    """The root mean square of the difference, of the numbers at `where`."""
    found, wanted = (np.asarray(x, np.float64)[where] for x in (found, wanted))
    return np.sqrt(np.mean((found - wanted) ** 2))


def check(evidence, shape, rule, config, dtype="bfloat16", seen=Seen(None, None), sinks=None, seed=0):
    """Compare every result of both passes with float64; record the worst error over XLA's in the same dtype."""
    batch, queries, keys, heads, kv_heads, head_dim, value_dim = shape
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    q, k = draw(batch, queries, heads, head_dim), draw(batch, keys, kv_heads, head_dim)
    v, d_out = draw(batch, keys, kv_heads, value_dim), draw(batch, queries, heads, value_dim)
    with jax.enable_x64(True):
        exact = [np.asarray(x) for x in with_gradients(jnp.float64, (q, k, v), d_out, sinks, seen, rule)]
    same = with_gradients(dtype, (q, k, v), d_out, sinks, seen, rule)
    with simulated_gpu():
        assert hopper.refusal(q, k, v, rule, seen, sinks) is None
        out, lse = hopper.forward(q, k, v, sinks, seen, rule, config)
        delta = jnp.einsum("btnd,btnd->bnt", d_out.astype(jnp.float32), out.astype(jnp.float32))
        gradients = hopper.backward(q, k, v, lse, delta, d_out, seen, rule, config)
    assert [x.dtype for x in (out, lse, *gradients)] == [q.dtype, jnp.float32, q.dtype, k.dtype, v.dtype]
    empty = exact[1] < -1e29
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert not np.asarray(out, np.float32)[empty.transpose(0, 2, 1)].any()
    evidence.record(np.abs(np.asarray(lse) - exact[1])[~empty].max(), LARGEST)
    names = ("output", "log-sum-exp", "query", "key", "value")
    for name, mine, its, want in zip(names, (out, lse, *gradients), same, exact):
        there = ~empty if name == "log-sum-exp" else ...
        error, allowance = rms(mine, want, there), WORSE * rms(its, want, there)
        assert error <= allowance, f"{name}: {error:.3g} exceeds {allowance:.3g}"
        evidence.record(error, allowance)


def documents(rng, batch, length, count, absent):
    """Ids of `count` documents in sequence and then absent tokens, of queries and keys."""
    ids = np.sort(rng.integers(0, count, (batch, length)), axis=1)
    ids[:, length - absent :] = -1
    return jnp.asarray(ids, jnp.int32), jnp.asarray(np.where(ids < 0, -2, ids), jnp.int32)


ORACLE = "XLA attention and jax.vjp in float64; XLA's own error in the same dtype"
TOGETHER = hopper.Config(64, 2, 64, 2, 2, 64, 2, dkv_split=False)
APART = hopper.Config(64, 2, 64, 2, 1, 64, 2, dkv_split=True)


@simulated
@evidence("C01", oracle=ORACLE, code="pallas_kernels.attention.hopper.forward")
@pytest.mark.parametrize("config", [TOGETHER, APART], ids=["together", "apart"])
def test_causal_grouped_heads(config, evidence):
    """Odd lengths; more blocks than buffers, so that every ring turns."""
    check(evidence, (1, 250, 250, 2, 1, 64, 64), Rule(0.125, True, None, None), config)


@simulated
@evidence("C01", oracle=ORACLE, code="pallas_kernels.attention.hopper.forward")
def test_documents_sinks_and_soft_cap(evidence):
    seen = Seen(None, documents(np.random.default_rng(1), 2, 120, 3, absent=20))
    sinks = jnp.asarray([0.5, -1.0], jnp.float32)
    check(evidence, (2, 120, 120, 2, 2, 64, 64), Rule(0.125, True, None, 2.0), TOGETHER, seen=seen, sinks=sinks)


@simulated
@evidence("C01", oracle=ORACLE, code="pallas_kernels.attention.hopper.forward")
@pytest.mark.parametrize("cap", [20.0, 50.0])
def test_soft_caps_far_above_the_scores(cap, evidence):
    """What is wrong with tanh near zero, the log-sum-exp shows times the cap."""
    check(evidence, (1, 130, 130, 1, 1, 64, 64), Rule(0.125, True, None, cap), TOGETHER)


@evidence("C01", oracle="numpy.tanh in float64", code="pallas_kernels.attention.hopper_blocks.capped")
def test_the_tanh_of_the_soft_cap(evidence):
    """Relative errors of a few roundings from 1e-30 on, around the seam too; exactly 1 far out."""
    y = np.geomspace(1e-30, 8, 200_001, dtype=np.float32)
    y = np.concatenate([y, np.linspace(0.6, 0.65, 10_001, dtype=np.float32)])
    y = np.concatenate([y, -y])
    x, unit = hopper_blocks.capped(Rule(1.0, True, None, 1.0), jnp.asarray(y))
    wanted = np.tanh(y.astype(np.float64))
    evidence.record(np.abs(np.asarray(x, np.float64) / wanted - 1).max(), tolerance=2**-20)
    assert unit == hopper_blocks.LOG2E
    far = hopper_blocks.capped(Rule(1.0, True, None, 1.0), jnp.asarray([-3e38, -30.0, 0.0, 30.0, 3e38]))[0]
    np.testing.assert_array_equal(far, [-1, -1, 0, 1, 1])


@simulated
@evidence("C01", oracle=ORACLE, code="pallas_kernels.attention.hopper.forward")
def test_positions_in_float16(evidence):
    """Positions out of order, and a window over them."""
    rng = np.random.default_rng(2)
    positions = tuple(jnp.asarray(rng.permutation(170)[None], jnp.int32) for _ in range(2))
    seen = Seen(positions, documents(rng, 1, 170, 2, absent=0))
    check(evidence, (1, 170, 170, 1, 1, 64, 64), Rule(0.125, True, (80, None), None), APART, "float16", seen)


@simulated
@evidence("C01", oracle=ORACLE, code="pallas_kernels.attention.hopper.forward")
def test_window_with_more_keys_than_queries(evidence):
    check(evidence, (1, 70, 233, 1, 1, 64, 64), Rule(0.125, False, (30, 90), None), TOGETHER)


@simulated
@pytest.mark.slow
@evidence("C01", oracle=ORACLE, code="pallas_kernels.attention.hopper.forward")
@pytest.mark.parametrize("dims", hopper.CONFIGS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_shipped_configurations(dims, packed, evidence):
    """Every head dim with the heuristic's blocks: plain causal, and packed with window, cap and sinks."""
    rule = Rule(dims[0] ** -0.5, True, (150, None) if packed else None, 20.0 if packed else None)
    seen = Seen(None, documents(np.random.default_rng(3), 1, 300, 2, absent=10) if packed else None)
    sinks = jnp.asarray([0.3, 0.0]) if packed else None
    shape = (1, 300, 300, 2, 1, *dims)
    config = hopper.heuristic(shape, shape, (dims[1],), jnp.bfloat16, rule)
    check(evidence, shape, rule, config, seen=seen, sinks=sinks)


@simulated
@evidence("C01", oracle="the same run again, bit by bit", code="pallas_kernels.attention.hopper")
def test_runs_repeat_bit_by_bit(evidence):
    """However the simulation's threads take turns; in float16, which shows more of the sums' order than bfloat16."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float16)
    q, d_out, k, v = draw(1, 190, 2, 64), draw(1, 190, 2, 64), draw(1, 190, 1, 64), draw(1, 190, 1, 64)
    seen, rule = Seen(None, None), Rule(0.125, True, None, 20.0)

    def both(config):
        with simulated_gpu():
            out, lse = hopper.forward(q, k, v, None, seen, rule, config)
            delta = jnp.einsum("btnd,btnd->bnt", d_out.astype(jnp.float32), out.astype(jnp.float32))
            return out, lse, *hopper.backward(q, k, v, lse, delta, d_out, seen, rule, config)

    bits = lambda results: [np.asarray(x).tobytes() for x in results]
    interval = sys.getswitchinterval()
    first = bits(both(TOGETHER))
    try:
        sys.setswitchinterval(interval / 1000)
        second = bits(both(TOGETHER))
    finally:
        sys.setswitchinterval(interval)
    evidence.record(sum(x != y for x, y in zip(first, second, strict=True)), 0)
    other = bits(both(replace(TOGETHER, block_k=128, dq_block_k=128, dkv_block_q=128)))
    assert first[:2] != other[:2]  # sums in another order: it would have been seen
    assert first[2:] != other[2:]


@simulated
def test_nan_stays_in_its_sequence():
    """NaN in absent tokens of one batch element and everywhere in another reaches nothing else."""
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 128, 1, 64)), jnp.bfloat16) for _ in range(3))
    ids = jnp.where(jnp.arange(128) < 100, 0, -1)[None]
    seen = Seen(None, (ids, jnp.where(ids < 0, -2, ids)))
    rule = Rule(0.125, True, None, None)
    spoilt = [x.at[0, 100:].set(jnp.nan).at[1].set(jnp.nan) for x in (q, k, v)]
    with simulated_gpu():
        out, lse = hopper.forward(q, k, v, None, seen, rule, TOGETHER)
        again, lse_again = hopper.forward(*spoilt, None, seen, rule, TOGETHER)
    np.testing.assert_array_equal(out[0].astype(jnp.float32), again[0].astype(jnp.float32))
    np.testing.assert_array_equal(lse[0], lse_again[0])
    assert np.isnan(np.asarray(again[1, 0], np.float32)).all()


edges = st.none() | st.integers(0, 300)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.tuples(*2 * [st.sampled_from([1, 64, 130, 400])]),  # each shape compiles
    causal=st.booleans(),
    window=st.none() | st.tuples(edges, edges),
)
def test_ranges_and_whole_blocks_follow_the_mask(lengths, causal, window):
    """By formula: no key outside a tile's range is seen, and all of a block that counts as whole is."""
    rule, block = Rule(1.0, causal, window, None), 64
    padded = [-(-n // m) * m for n, m in zip(lengths, (hopper_blocks.TILE, block))]
    sight = hopper_blocks.Sight(rule, lengths[1], *padded)
    mask = np.zeros(padded, bool)
    mask[: lengths[0], : lengths[1]] = allowed(rule, ends(Seen(None, None), lengths))[0]
    for tile in range(padded[0] // hopper_blocks.TILE):
        rows = slice(tile * hopper_blocks.TILE, (tile + 1) * hopper_blocks.TILE)
        first, stop = map(int, hopper_blocks.key_range(sight, SimpleNamespace(), 0, tile, block))
        assert 0 <= first <= stop <= padded[1] // block
        assert not mask[rows, : first * block].any()
        assert not mask[rows, stop * block :].any()
        for i in range(first, stop):
            columns = slice(i * block, (i + 1) * block)
            whole = hopper_blocks.whole_block(
                sight, SimpleNamespace(), 0, (tile, i), (rows.start, hopper_blocks.TILE), (columns.start, block)
            )
            assert not whole or mask[rows, columns][: max(lengths[0] - rows.start, 0)].all()
    for i in range(padded[1] // block):
        first, stop = map(int, hopper_blocks.query_range(sight, SimpleNamespace(), 0, i, block, 64))
        assert 0 <= first <= stop <= padded[0] // 64
        seen = mask[:, i * block : (i + 1) * block]
        assert not seen[: first * 64].any()
        assert not seen[stop * 64 :].any()


def test_what_is_refused():
    """By name, with the reason; what is shipped and what is to be tuned fits the shared memory."""
    x = jnp.zeros((1, 8, 2, 128), jnp.bfloat16)
    rule, seen = Rule(0.1, False, None, None), Seen(None, None)
    assert hopper.refusal(x, x, x, rule, seen, None) is None
    assert "head dims" in hopper.refusal(x[..., :96], x[..., :96], x[..., :96], rule, seen, None)
    assert "float32" in hopper.refusal(*[x.astype(jnp.float32)] * 3, rule, seen, None)
    assert "positive" in hopper.refusal(x, x, x, Rule(-1.0, False, None, None), seen, None)
    assert "lengths" in hopper.refusal(x[:, :0], x, x, rule, seen, None)
    for dims in hopper.CONFIGS:
        shapes = ((1, 512, 8, dims[0]), (1, 512, 2, dims[0]), (1, 512, 2, dims[1]))
        found = hopper.candidates(*shapes, jnp.bfloat16, rule)
        assert found[0] == hopper.heuristic(*shapes, jnp.bfloat16, rule)
        assert len(found) > 1
    with absent_gpu():
        assert target() == ("gpu", "NVIDIA H200")
    assert target()[0] == jax.default_backend()
