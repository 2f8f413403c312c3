"""The TPU attention kernels, simulated on the CPU, against float64 and jax.nn; memories start as NaN, races fail."""

import contextlib
import functools
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu, tpu_backward, tpu_blocks
from pallas_kernels.attention.mask import ABSENT_KEY, ABSENT_QUERY, Rule, Seen
from pallas_kernels.attention.registry import passes
from pallas_kernels.attention.vjp import Kernel, Operands, Visible, blockwise
from pallas_kernels.attention.xla import xla_attention
from tests.evidence import evidence
from tests.kernels.oracle import attend, visible

SMALL = tpu.Config(128, 256, 128, 128, 256, 128, 512)
TOLERANCE = 3e-6  # float32 rounding of sums over at most 512 terms, as a part of the largest number
PLAIN = Seen(None, None)


@contextlib.contextmanager
def simulated(cores=1):
    """Kernels run on the CPU; every number that was not written is NaN; a race fails."""
    interpret_pallas_call.races = None
    options = {"detect_races": True, "uninitialized_memory": "nan", "num_cores_or_threads": cores}
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**options)):
        yield
    assert interpret_pallas_call.races is not None, "no kernel was simulated"
    assert not interpret_pallas_call.races.races_found


def inputs(batch=1, length=300, key_length=None, heads=2, kv_heads=1, head_dim=64, value_dim=64, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    kv = (batch, key_length or length, kv_heads)
    shapes = [(batch, length, heads, head_dim), (*kv, head_dim), (*kv, value_dim), (batch, length, heads, value_dim)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def rule(causal=False, window=None, soft_cap=None, scale=0.125):
    return Rule(scale, causal, window, soft_cap)


def forward(q, k, v, rule, seen=PLAIN, sinks=None, config=SMALL, cores=1):
    with simulated(cores):
        return jax.block_until_ready(jax.jit(lambda *a: tpu.forward(*a, rule, config))(q, k, v, sinks, seen))


def backward(q, k, v, lse, delta, d_out, rule, seen=PLAIN, config=SMALL, cores=1):
    rows = [jnp.asarray(x, jnp.float32) for x in (lse, delta)]
    with simulated(cores):
        run = jax.jit(lambda *a: tpu.backward(*a, rule, config))
        return jax.block_until_ready(run(q, k, v, *rows, d_out, seen))


def expected(q, k, v, d_out, rule, seen=PLAIN, sinks=None):
    """Output, log-sum-exp [batch, heads, length], delta and the gradients, by the formulas in float64."""
    options = {"positions": seen.positions and tuple(map(np.asarray, seen.positions))}
    options["segments"] = seen.segments and tuple(map(np.asarray, seen.segments))
    pairs = visible(q.shape[0], (q.shape[1], k.shape[1]), rule.causal, rule.window or (None, None), **options)
    out, lse, weights = attend(q, k, v, None, pairs, sinks, rule.scale, rule.soft_cap)
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    groups = q.shape[2] // k.shape[2]
    keys, values = np.repeat(k, groups, 2), np.repeat(v, groups, 2)
    delta = np.einsum("btnd,btnd->bnt", d_out, out)
    d_scores = weights * (np.einsum("btnd,bsnd->bnts", d_out, values) - delta[..., None]) * rule.scale
    if rule.soft_cap is not None:
        d_scores *= 1 - np.tanh(np.einsum("btnd,bsnd->bnts", q, keys) * rule.scale / rule.soft_cap) ** 2
    fold = lambda x: x.reshape(*x.shape[:2], k.shape[2], groups, -1).sum(3)
    d_query = np.einsum("bnts,bsnd->btnd", d_scores, keys)
    d_key, d_value = (np.einsum("bnts,btnd->bsnd", x, y) for x, y in ((d_scores, q), (weights, d_out)))
    return out, lse.transpose(0, 2, 1), delta, (d_query, fold(d_key), fold(d_value))


def worst(ours, theirs):
    """The largest difference as a part of the largest number; infinities must be the same."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    return np.abs(ours[finite] - theirs[finite]).max() / np.abs(theirs[finite]).max()


def documents(batch, length, count=4):
    ids = np.sort(np.random.default_rng(1).integers(0, count, (batch, length)), axis=1)
    return jnp.asarray(ids, jnp.int32)


def ragged(batch, length):
    """Documents with absent tokens after them, unlike on both sides."""
    ids = documents(batch, length)
    return ids.at[:, -100:].set(ABSENT_QUERY), ids.at[:, -200:].set(ABSENT_KEY)


INTERLEAVED = jnp.asarray(np.r_[0:390:2, 1:390:2][None], jnp.int32)
CASES = {
    "full": ({"batch": 2, "length": 256, "key_length": 512, "kv_heads": 2}, rule(), PLAIN, False),
    "causal_odd_grouped": ({"length": 301, "heads": 4, "kv_heads": 2}, rule(causal=True), PLAIN, False),
    "short": ({"length": 5, "key_length": 3}, rule(), PLAIN, True),
    "window_wide_value": ({"length": 390, "value_dim": 128}, rule(causal=True, window=(100, 0)), PLAIN, False),
    "window_both_mla": (
        *({"length": 390, "key_length": 300, "head_dim": 192, "value_dim": 128}, rule(window=(100, 150), scale=0.07)),
        *(PLAIN, True),
    ),
    "packed_capped": ({"length": 390}, rule(causal=True, soft_cap=5.0), Seen(None, (documents(1, 390),) * 2), True),
    "positions": ({"length": 390}, rule(causal=True, window=(50, 0)), Seen((INTERLEAVED,) * 2, None), False),
    "absent": ({"batch": 2, "length": 260}, rule(), Seen(None, ragged(2, 260)), False),
    "absent_positions": ({"length": 390}, rule(causal=True), Seen((INTERLEAVED,) * 2, ragged(1, 390)), True),
}


@evidence("C01", oracle="float64 formulas in numpy", code="pallas_kernels.attention.tpu")
@evidence("C06", oracle="float64 formulas in numpy with the dense mask", code="pallas_kernels.attention.tpu")
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name, evidence):
    shapes, given, seen, sink = CASES[name]
    q, k, v, d_out = inputs(**shapes)
    sinks = jnp.linspace(-1.0, 0.5, q.shape[2]) if sink else None
    out, lse, delta, grads = expected(q, k, v, d_out, given, seen, sinks)
    evidence.record(max(map(worst, forward(q, k, v, given, seen, sinks), (out, lse))), TOLERANCE)
    ours = backward(q, k, v, lse, delta, d_out, given, seen)
    evidence.record(max(map(worst, ours, grads)), TOLERANCE)


@evidence("C01", oracle="jax.vjp of jax.nn.dot_product_attention, float32", code="pallas_kernels.attention.tpu")
@pytest.mark.parametrize("head_dim", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_the_whole_gradient_agrees_with_jax(head_dim, evidence):
    """Through the shared custom gradient, a causal window over both sides of block borders."""
    q, k, v, d_out = inputs(length=390, heads=2, kv_heads=1, head_dim=head_dim, value_dim=head_dim)
    given = rule(causal=True, window=(200, 0), scale=head_dim**-0.5)
    kernel = Kernel(*passes("tpu"), given, SMALL)
    ours = lambda q, k, v: blockwise(kernel, Operands(q, k, v, None, None), Visible(PLAIN, None))[0]
    theirs = lambda *a: jax.nn.dot_product_attention(*a, is_causal=True, local_window_size=(200, 0))
    both = lambda f: jax.jit(lambda q, k, v, d: (lambda out, pull: (out, *pull(d)))(*jax.vjp(f, q, k, v)))
    with simulated():
        found = jax.block_until_ready(both(ours)(q, k, v, d_out))
    evidence.record(max(map(worst, found, both(theirs)(q, k, v, d_out))), TOLERANCE)


@pytest.mark.slow
@evidence("C01", oracle="jax.nn.dot_product_attention in bfloat16", code="pallas_kernels.attention.tpu")
def test_bfloat16_errors_are_those_of_jax(evidence):
    """Root mean square errors against float64: at most 1.3 times those of jax.nn with the same numbers."""
    arrays = inputs(length=256, heads=2, kv_heads=1, head_dim=128, value_dim=128, dtype=jnp.bfloat16)
    given = rule(causal=True, scale=128**-0.5)
    out, lse, delta, grads = expected(*arrays, given)
    q, k, v, d_out = arrays
    found, sums = forward(q, k, v, given)
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    theirs, pull = jax.vjp(attention, q, k, v)
    mine = (found, *backward(q, k, v, sums, delta, d_out, given))
    rms = lambda x, y: np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2))
    for x, y, z in zip(mine, (theirs, *pull(d_out)), (out, *grads)):
        evidence.record(rms(x, z), 1.3 * rms(y, z))
    # The sums are float32 throughout: products of bfloat16 numbers are exact in it.
    evidence.record(worst(sums, lse), TOLERANCE)


BFLOAT16 = {
    "window_grouped_64": ({"length": 200, "heads": 4, "kv_heads": 2}, rule(causal=True, window=(70, 0))),
    "mla": ({"length": 180, "heads": 1, "head_dim": 192, "value_dim": 128}, rule(causal=True, scale=192**-0.5)),
    "cap_20": ({"length": 200}, rule(soft_cap=20.0)),
}


@evidence("C01", oracle="float64 formulas in numpy; XLA's own error in bfloat16", code="pallas_kernels.attention.tpu")
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_errors_are_those_of_xla(name, evidence):
    """Root mean squares of output, log-sum-exp and gradients as a call has them: each at most 1.3 times XLA's."""
    shapes, given = BFLOAT16[name]
    *arrays, d_out = inputs(**shapes, dtype=jnp.bfloat16)
    kernel = Kernel(*passes("tpu"), given, SMALL)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, q, k, v, d_out):
        take = lambda q, k, v: function(Operands(q, k, v, None, None), Visible(PLAIN, None))
        (out, lse), pull = jax.vjp(take, q, k, v)
        return out, lse, *pull((d_out, jnp.zeros_like(lse)))

    with simulated():
        mine = jax.block_until_ready(both(functools.partial(blockwise, kernel), *arrays, d_out))
    theirs = both(functools.partial(xla_attention, rule=given, config=None), *arrays, d_out)
    out, lse, _, grads = expected(*arrays, d_out, given)
    rms = lambda x, y: np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2))
    for x, y, z in zip(mine, theirs, (out, lse, *grads), strict=True):
        assert x.shape == y.shape == z.shape
        assert x.dtype == y.dtype
        evidence.record(rms(x, z), 1.3 * rms(y, z))


@pytest.mark.slow
@evidence(
    "C01", oracle="the same with blocks of another size, and bit by bit again", code="pallas_kernels.attention.tpu"
)
def test_block_sizes_do_not_matter_and_runs_repeat(evidence):
    q, k, v, d_out = inputs(length=384, heads=2, kv_heads=1)
    given, other = rule(causal=True), tpu.Config(256, 128, 128, 256, 128, 128, 256)
    first = forward(q, k, v, given, cores=2)
    delta = jnp.zeros_like(first[1])
    gradients = backward(q, k, v, first[1], delta, d_out, given, cores=2)
    evidence.record(max(map(worst, forward(q, k, v, given, config=other), first)), TOLERANCE)
    evidence.record(
        max(map(worst, backward(q, k, v, first[1], delta, d_out, given, config=other), gradients)), TOLERANCE
    )
    again = (*forward(q, k, v, given), *backward(q, k, v, first[1], delta, d_out, given))
    for x, y in zip(again, (*first, *gradients)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@evidence("C01", oracle="the simulation with its own memories", code="pallas_kernels.attention.tpu")
def test_plain_interpreter_agrees(monkeypatch, evidence):
    q, k, v, d_out = inputs(length=200, key_length=300)
    given, seen = rule(window=(150, 20)), Seen(None, (documents(1, 200), documents(1, 300)))
    first = forward(q, k, v, given, seen)
    gradients = backward(q, k, v, first[1], jnp.zeros_like(first[1]), d_out, given, seen)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    second = jax.jit(lambda *a: tpu.forward(*a, None, seen, given, SMALL))(q, k, v)
    again = jax.jit(lambda *a: tpu.backward(*a, seen, given, SMALL))(q, k, v, first[1], jnp.zeros_like(first[1]), d_out)
    evidence.record(max(map(worst, (*second, *again), (*first, *gradients))), TOLERANCE)


@pytest.mark.slow
@evidence("C01", oracle="central differences in float64", code="pallas_kernels.attention.tpu")
def test_gradients_are_slopes(evidence):
    """In a process with float64: the kernels then compute in it."""
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.kernels.test_attention_tpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # Differences over 2e-4 of a function of curvature about 1: their own error is about 1e-8.
    evidence.record(float(done.stdout.split()[-1]), 1e-7)


def slopes():
    """The worst relative difference between gradients along random directions and central differences."""
    rng = np.random.default_rng(0)
    q, k, v, _ = (jnp.asarray(x, jnp.float64) for x in inputs(length=6, key_length=7, head_dim=8, value_dim=4))
    at = {"q": q, "k": k, "v": v, "sinks": jnp.asarray([0.3, -0.2])}
    ids = (jnp.asarray([[0, 0, 0, 1, 1, 2]], jnp.int32), jnp.asarray([[0, 0, 1, 1, 1, 1, ABSENT_KEY]], jnp.int32))
    kernel = Kernel(*passes("tpu"), rule(window=(3, 2), soft_cap=2.0, scale=0.4), SMALL)
    ways = [jnp.asarray(rng.standard_normal(shape)) for shape in ((1, 6, 2, 4), (1, 2, 6))]

    @jax.jit
    @jax.value_and_grad
    def loss(at):
        out, lse = blockwise(
            kernel, Operands(at["q"], at["k"], at["v"], None, at["sinks"]), Visible(Seen(None, ids), None)
        )
        return jnp.sum(out * ways[0]) + jnp.sum(lse * ways[1])

    def error(name, step=1e-4):
        way = jnp.asarray(rng.standard_normal(at[name].shape))
        ahead, behind = (loss(at | {name: at[name] + sign * step * way})[0] for sign in (1, -1))
        slope = (ahead - behind) / (2 * step)
        return abs(float(slope - jnp.vdot(loss(at)[1][name], way)) / float(slope))

    with simulated():
        return max(map(error, at))


# ---- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nan_stays_in_its_sequence_and_absent_tokens_do_not_matter():
    q, k, v, d_out = inputs(batch=2, length=300)
    rows, columns = jnp.arange(300) >= 250, jnp.arange(300) >= 220
    zeros = jnp.zeros((2, 300), jnp.int32)
    seen = Seen(None, (jnp.where(rows, ABSENT_QUERY, zeros), jnp.where(columns, ABSENT_KEY, zeros)))
    hide = lambda x, absent: jnp.where(absent[None, :, None, None], jnp.nan, x)
    given = rule(causal=True)
    out, lse, delta, grads = expected(q, k, v, d_out, given, seen)
    q, d_out, k, v = hide(q, rows), hide(d_out, rows), hide(k, columns), hide(v, columns)
    assert max(map(worst, forward(q, k, v, given, seen), (out, lse))) <= TOLERANCE
    assert max(map(worst, backward(q, k, v, lse, delta, d_out, given, seen), grads)) <= TOLERANCE
    poisoned = (x.at[0].set(jnp.nan) for x in (q, k, v))
    again, sums = forward(*poisoned, given, seen)
    assert max(worst(again[1], out[1]), worst(sums[1], lse[1])) <= TOLERANCE
    assert np.isnan(np.asarray(again[0, :250])).all()


def test_blocks_that_nobody_sees_are_not_touched():
    """Nobody sees the second half of the keys, whose values are infinite: 0 times infinity would be NaN."""
    q, k, v, d_out = inputs(length=512)
    ids = jnp.repeat(jnp.asarray([[0, 1]], jnp.int32), 256, axis=1)
    for given, seen in ((rule(), Seen(None, (ids, ids + 1))), (rule(window=(None, -256)), PLAIN)):
        out, _ = forward(q, k, v.at[:, 256:].set(jnp.inf), given, seen)
        theirs = expected(q, k, v, d_out, given, seen)[0]
        assert worst(out, theirs) <= TOLERANCE


@pytest.mark.parametrize("seed", range(6))
def test_static_visits_are_exactly_the_blocks_that_are_seen(seed):
    """Against the dense mask: what is visited, what counts as seen entirely, and that nothing else is fetched."""
    rng = np.random.default_rng(seed)
    lengths = tuple(int(n) for n in rng.integers(1, 2000, 2))
    window = (None if seed % 3 == 0 else int(rng.integers(0, 700)), None if seed % 2 else int(rng.integers(0, 700)))
    given = rule(causal=bool(rng.integers(2)), window=window)
    tiling = tpu_blocks.tile(lengths, PLAIN, given, 256, 256, 128)
    steps = tiling.steps()
    dense = visible(1, lengths, given.causal, window)[0]
    fetched = []
    for row in range(tiling.rows):
        kinds = np.zeros(tiling.columns, int)
        for step in range(steps):
            block, kind = (int(x) for x in tiling.locate(0, jnp.int32(row), jnp.int32(step), None))
            kinds[block] = max(kinds[block], kind)
            fetched.append((row, block))
        pairs = dense[row * tiling.block_q : (row + 1) * tiling.block_q]
        for block, kind in enumerate(kinds):
            part = pairs[:, block * tiling.block_k : (block + 1) * tiling.block_k]
            assert (kind > 0) == part.any(), (row, block)
            assert kind < 2 or part.all(), (row, block)
    touched = [
        dense[r * tiling.block_q :][: tiling.block_q, c * tiling.block_k :][:, : tiling.block_k].any()
        for r in range(tiling.rows)
        for c in range(tiling.columns)
    ]
    seen = np.asarray(touched).reshape(tiling.rows, tiling.columns)
    assert len(set(fetched)) == seen.sum() + (~seen.any(1)).sum()
    assert tiling.pairs() == dense.sum()
    cut = int(rng.integers(0, tiling.columns + 1))
    halves = [replace(tiling, part=part).pairs() for part in ((0, cut), (cut, tiling.columns))]
    assert halves == [dense[:, : cut * tiling.block_k].sum(), dense[:, cut * tiling.block_k :].sum()]


def test_the_table_repeats_blocks_instead_of_fetching_unseen_ones():
    ids = jnp.asarray(np.r_[[0] * 300, [1] * 500, [2] * 224][None], jnp.int32).at[:, 640:768].set(ABSENT_QUERY)
    seen = Seen(None, (ids, jnp.where(ids == ABSENT_QUERY, ABSENT_KEY, ids)))
    tiling = tpu_blocks.tile((1024, 1024), seen, rule(causal=True), 128, 128, 128)
    table, steps = tpu_blocks.visits(tiling, seen)
    blocks, kinds = np.asarray(table).reshape(8, 8) >> 2, np.asarray(table).reshape(8, 8) & 3
    dense = visible(1, (1024, 1024), True, segments=tuple(map(np.asarray, seen.segments)))[0]
    touched = dense.reshape(8, 128, 8, 128).any((1, 3))
    for row in range(8):
        visited = blocks[row][kinds[row] > 0]
        np.testing.assert_array_equal(visited, np.flatnonzero(touched[row]))
        assert all(dense[row * 128 :][:128, b * 128 :][:, :128].all() for b in blocks[row][kinds[row] == 2])
    assert int(steps) == touched.sum(1).max()
    assert not touched[5].any()
    changes = np.diff(blocks[:, : int(steps)].reshape(-1)) != 0
    assert changes.sum() + 1 <= touched.sum()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float16}, "dtype must be bfloat16 or float32, not float16"),
        ({"head_dim": 640}, "head dims must be at most 512, not 640 and 64"),
    ],
)
def test_refusals_say_why(change, reason):
    q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length=8, **change))
    assert tpu.refusal(q, k, v, rule(), PLAIN, None) == reason
    assert tpu.refusal(*inputs(length=8)[:3], rule(), PLAIN, None) is None
    wide = jax.ShapeDtypeStruct(q.shape, jnp.float64)
    assert "must share a dtype" in tpu.refusal(wide, k, v, rule(), PLAIN, None)


def test_the_heuristic_is_the_first_candidate_and_none_comes_twice():
    shapes = ((1, 4096, 8, 128), (1, 4096, 2, 128), (1, 4096, 2, 128))
    found = tpu.candidates(*shapes, jnp.bfloat16, rule(causal=True))
    assert found[0] == tpu.heuristic(*shapes, jnp.bfloat16, rule(causal=True))
    assert len(found) == len(set(found)) > 5


def test_the_package_reads_the_same_kernels():
    assert passes("tpu")[0].__closure__ is not None
    assert tpu.backward is tpu_backward.backward


if __name__ == "__main__":
    print(slopes())
