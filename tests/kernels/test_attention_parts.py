"""The parts that implementations share: the merge of partial results, masks by blocks, and the support table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, merge_partials
from pallas_kernels.attention.mask import ABSENT_KEY, ABSENT_QUERY, Rule, Seen, allowed, block_map, ends, first_last
from tests.evidence import evidence
from tests.kernels.oracle import attend

TOLERANCE = 2e-6  # float32 rounding of weighted means of numbers of size about 1


def partials(parts=3, empty=()):
    """Outputs and log-sum-exps of disjoint sets of keys, and numpy's attention over all of them."""
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, n, 2, 4)) for n in (5, 12, 12))
    keys = [[] if p in empty else range(p, 12, parts) for p in range(parts)]
    used = sorted(i for part in keys for i in part)
    each = [
        attention(*(jnp.asarray(x, jnp.float32) for x in (q, k[:, list(part)], v[:, list(part)])), return_residual=True)
        if part
        else (jnp.zeros((2, 5, 2, 4)), jnp.full((2, 5, 2), -jnp.inf))
        for part in keys
    ]
    outs, lses = (jnp.stack(x) for x in zip(*each))
    whole = attend(q, k[:, used], v[:, used])[:2] if used else (np.zeros((2, 5, 2, 4)), np.full((2, 5, 2), -np.inf))
    return outs, lses, whole


@evidence("C03", oracle="numpy's float64 attention over the union of the keys", code="pallas_kernels.merge_partials")
@pytest.mark.parametrize("empty", [(), (1,), (0, 1, 2)], ids=str)
def test_merge_is_attention_over_the_union(empty, evidence):
    outs, lses, (out, lse) = partials(empty=empty)
    got_out, got_lse = merge_partials(outs, lses)
    evidence.record(np.abs(np.asarray(got_out) - out).max(), TOLERANCE)
    np.testing.assert_allclose(got_lse, lse, atol=TOLERANCE)


@evidence("C03", oracle="associativity and commutativity", code="pallas_kernels.merge_partials")
def test_merge_is_associative_and_commutative(evidence):
    outs, lses, _ = partials()
    merge = lambda a, b: merge_partials(jnp.stack([a[0], b[0]]), jnp.stack([a[1], b[1]]))
    a, b, c = zip(outs, lses)
    wanted = merge_partials(outs, lses)
    for got in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        for x, y in zip(got, wanted):
            evidence.record(float(jnp.abs(x - y).max()), TOLERANCE)


@evidence("C03", oracle="gated mix of two attentions (He et al. 2022)", code="pallas_kernels.merge_partials")
def test_a_prefix_mixes_with_a_gate(evidence):
    """Attn(q, [P; K]) = (1 - g) Attn(q, K) + g Attn(q, P), g the prefix's share of the normaliser."""
    outs, lses, _ = partials(parts=2)
    gate = np.exp(np.asarray(lses[1], np.float64)) / np.exp(np.asarray(lses, np.float64)).sum(0)
    mixed = (1 - gate)[..., None] * outs[0] + gate[..., None] * outs[1]
    evidence.record(float(np.abs(merge_partials(outs, lses)[0] - mixed).max()), TOLERANCE)


def test_gradients_of_a_merge_with_an_empty_part_are_finite():
    outs, lses, _ = partials(empty=(1,))
    both = lambda outs, lses: sum(jnp.sum(jnp.sin(x)) for x in merge_partials(outs, lses))
    grads = jax.grad(both, argnums=(0, 1))(outs, lses)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)
    nudge = 1e-2 * jnp.cos(jnp.arange(lses.size, dtype=jnp.float32)).reshape(lses.shape)
    slope = (both(outs, lses + nudge) - both(outs, lses - nudge)) / 2
    np.testing.assert_allclose(jnp.sum(grads[1] * nudge), slope, rtol=1e-3)  # third order in nudges of 1e-2


RULES = {
    "full": Rule(1.0, False, None, None),
    "causal": Rule(1.0, True, None, None),
    "causal_window": Rule(1.0, True, (3, 0), None),
    "window": Rule(1.0, False, (2, 4), None),
    "left": Rule(1.0, False, (2, None), None),
}


@evidence("C06", oracle="the dense mask, block by block", code="pallas_kernels.attention.mask")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("positioned", [False, True])
def test_block_map_never_claims_too_much(rule, packed, positioned, evidence):
    """0 only where nothing is seen, 2 only where all is; exact where positions are indices of one document."""
    random, (t, s), (bq, bk) = np.random.default_rng(1), (21, 26), (4, 5)
    segments = positions = None
    if packed:
        segments = tuple(jnp.asarray(np.sort(random.integers(0, 3, (2, n)), axis=1), jnp.int32) for n in (t, s))
        segments = (segments[0].at[1, 17:].set(ABSENT_QUERY), segments[1].at[1, 20:].set(ABSENT_KEY))
    if positioned:
        positions = tuple(jnp.asarray(random.permuted(np.tile(np.arange(n), (2, 1)), axis=1)[:, :n]) for n in (t, s))
        positions = tuple(p.astype(jnp.int32) for p in positions)
    tokens = Seen(positions, segments)
    blocks = np.asarray(block_map(tokens, rule, t, s, bq, bk))
    dense = np.asarray(allowed(rule, ends(tokens, (t, s))))
    padded = np.zeros((dense.shape[0], 24, 30), bool)
    padded[:, :t, :s] = dense
    tiles = padded.reshape(-1, 6, 4, 6, 5)
    wanted = tiles.any((2, 4)).astype(int) + tiles.all((2, 4))
    wanted = np.broadcast_to(wanted, blocks.shape) if wanted.shape[0] == 1 else wanted
    wrong = ((blocks == 0) & (wanted != 0)) | ((blocks == 2) & (wanted != 2))
    evidence.record(wrong.sum(), 0)
    if not packed and not positioned:
        np.testing.assert_array_equal(blocks, wanted)
    start, stop = first_last(jnp.asarray(blocks))
    for row, first, last in zip(blocks.reshape(-1, 6), np.ravel(start), np.ravel(stop)):
        np.testing.assert_array_equal(np.flatnonzero(row)[[0, -1]] if row.any() else [0, -1], [first, last - 1])


def test_packed_documents_are_skipped():
    """Four documents of four blocks each: causal attention visits 40 of 256 blocks, 16 of them in part."""
    segments = jnp.repeat(jnp.arange(4), 16)[None].astype(jnp.int32)
    blocks = np.asarray(block_map(Seen(None, (segments, segments)), RULES["causal"], 64, 64, 4, 4))
    assert (blocks > 0).sum() == 40
    assert (blocks == 1).sum() == 16
