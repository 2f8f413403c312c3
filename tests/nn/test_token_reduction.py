"""Fewer visual tokens and frames: PriorTR (A49), CLSE (A50), AdaQ (A51), and what removes tokens from a decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import truncnorm

from llmjax.nn.ada_q import ada_q, bounds, distinct, spread, truncated_gaussian
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block, BlockModule
from llmjax.nn.clse import clse, detail, evolution, last_attention
from llmjax.nn.decoder import Decoder
from llmjax.nn.mixer import Context
from llmjax.nn.mla import MLA
from llmjax.nn.prior_tr import information, prior_tr
from llmjax.nn.token_reduction import Seen, Stage, gather, kept, reduced_logits, visual_attention
from tests.evidence import evidence

pytestmark = pytest.mark.mixers

RANDOM = np.random.default_rng(0)
IMAGE = jnp.asarray([[0, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]], bool)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


SEEN = Seen(normal(2, 9, 5), normal(2, 9, 5), normal(2, 9, 4, 3), normal(2, 9, 2, 3), IMAGE, 0.7)


def attention(seen, row, end):
    """Mean over heads of causal softmax attention of one token of one row, over the image alone: a loop."""
    mean = np.zeros(9)
    for head in range(4):
        scores = [0.7 * np.dot(seen.query[row, end, head], seen.key[row, at, head // 2]) for at in range(end + 1)]
        mean[: end + 1] += np.exp(scores) / np.sum(np.exp(scores)) / 4
    mean = np.where(IMAGE[row], mean, 0)
    return mean / mean.sum()


@evidence("A49", oracle="a loop over heads and keys; scipy rel_entr", code="llmjax.nn.prior_tr")
def test_prior_tr_compares_the_question_with_the_token_after_the_image(evidence):
    """Prior: tokens 7 and 6, right after the images; posterior: token 8. Other tokens score 0."""
    found = np.asarray(prior_tr(SEEN))
    for row, after in enumerate((7, 6)):
        posterior, prior = attention(SEEN, row, 8), attention(SEEN, row, after)
        evidence.record(np.abs(visual_attention(SEEN, jnp.asarray([8, 8]))[row] - posterior).max(), 1e-6)
        evidence.record(np.abs(found[row] - rel_entr(posterior, prior)).max(), 1e-6)
    assert not found[~np.asarray(IMAGE)].any()


@evidence("A49", oracle="KL divergence; worked numbers", code="llmjax.nn.prior_tr.information")
def test_information_sums_to_the_divergence(evidence):
    """P = (.5, .3, .2), Q = (.7, .2, .1): the token with the most attention has the lowest score."""
    p, q = jnp.asarray([[0.5, 0.3, 0.2]]), jnp.asarray([[0.7, 0.2, 0.1]])
    evidence.record(np.abs(information(p, q) - np.array([[-0.168236, 0.121640, 0.138629]])).max(), 1e-6)
    p, q = RANDOM.dirichlet(np.ones(40), 3), RANDOM.dirichlet(np.ones(40), 3)
    divergence = rel_entr(p, q).sum(axis=1)
    evidence.record(np.abs(information(jnp.asarray(p), jnp.asarray(q)).sum(axis=1) - divergence).max(), 1e-5)
    evidence.record(np.abs(information(jnp.asarray(p), jnp.asarray(p))).max(), 0.0)
    assert np.isfinite(information(jnp.asarray([0.0, 1.0]), jnp.asarray([1.0, 0.0]))).all()


@evidence("A50", oracle="NumPy FFT; a constant field", code="llmjax.nn.clse.detail")
def test_detail_is_what_a_high_pass_leaves(evidence):
    grid = RANDOM.normal(size=(2, 6, 8, 3))
    spectrum = np.fft.fftshift(np.fft.fft2(grid, axes=(1, 2)), axes=(1, 2))
    distance = (np.arange(6) - 3)[:, None] ** 2 + (np.arange(8) - 4) ** 2
    spectrum *= (1 - np.exp(-distance / (2 * 0.3**2)))[..., None]
    expected = np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(1, 2)), axes=(1, 2))).mean(axis=-1)
    evidence.record(np.abs(detail(jnp.asarray(grid)) - expected).max(), 1e-5)
    evidence.record(np.abs(detail(jnp.full((1, 6, 8, 3), 5.0))).max(), 1e-5)


@evidence("A50", oracle="identical layers; the formula in NumPy", code="llmjax.nn.clse")
def test_clse_weighs_attention_by_change(evidence):
    """Without change all weights are 1/2; with change they are the sigmoid of its z-score over 0.1."""
    still = clse(2, 3)(SEEN.replace(hidden=SEEN.first))
    evidence.record(np.abs(still - 0.5 * last_attention(SEEN)).max(), 1e-6)
    found = np.asarray(clse(2, 3)(SEEN))
    for row in range(2):
        marks = np.asarray(IMAGE[row])
        first, now = (
            np.asarray(detail(x[row][marks].reshape(1, 2, 3, 5))).reshape(-1) for x in (SEEN.first, SEEN.hidden)
        )
        change = np.minimum(1, np.abs(now - first) / (first.mean() + first + 1e-6))
        evidence.record(np.abs(evolution(first[None], now[None])[0] - change).max(), 1e-6)
        weight = 1 / (1 + np.exp(-(change - change.mean()) / (change.std() + 1e-6) / 0.1))
        expected = np.zeros(9)
        expected[marks] = weight * attention(SEEN, row, 8)[marks]
        evidence.record(np.abs(found[row] - expected).max(), 1e-4)


def test_the_lowest_image_tokens_go():
    """All text stays, order stays, as many go as were asked for; the first of equals stays."""
    scores = jnp.asarray([[9, 1, 5, 5, 2, 8, 5, -9, -9.0], [3, 3, 3, 3, 3, 3, 0, 0, 0]])
    assert kept(scores, IMAGE, 4).tolist() == [[0, 2, 5, 7, 8], [0, 1, 6, 7, 8]]
    assert kept(scores, IMAGE, 0).tolist() == [list(range(9))] * 2
    x, positions = gather((normal(2, 9, 3, 2), jnp.arange(18).reshape(2, 9)), kept(scores, IMAGE, 4))
    assert x.shape == (2, 5, 3, 2)
    assert positions.tolist() == [[0, 2, 5, 7, 8], [9, 10, 15, 16, 17]]


DECODER = Decoder(vocab=13, d_model=16, layers=3, pattern=(Block(mixer=Attention(heads=4, kv_heads=2)),), unroll=1)
TOKENS = jnp.asarray(RANDOM.integers(13, size=(2, 9)))


@pytest.fixture(scope="module")
def decoder():
    """Parameters, and logits and sites of the whole rows."""
    leaves, tree = jax.tree.flatten(DECODER.abstract())
    params = jax.tree.unflatten(tree, [jnp.asarray(RANDOM.normal(0, 0.3, a.shape), jnp.float32) for a in leaves])
    (logits, _), captured = jax.jit(lambda p: DECODER.build().apply({"params": p}, TOKENS, mutable=["sites"]))(params)
    return params, logits, captured["sites"]


@evidence("A49", oracle="the whole decoder; scores of its own sites", code="llmjax.nn.token_reduction")
def test_stages_remove_tokens_between_layers(decoder, evidence):
    """Nothing dropped: the whole rows' logits. 4 of 6 dropped after 2 of 3 layers: the third sees only the others."""
    params, logits, sites = decoder
    embedded = sites["embedded"]
    nothing = [Stage(1, 0, prior_tr), Stage(3, 0, prior_tr)]
    same, indices = jax.jit(lambda p, x: reduced_logits(DECODER, p, x, IMAGE, nothing))(params, embedded)
    evidence.record(np.abs(same - logits).max(), 3e-5)
    assert indices.tolist() == [list(range(9))] * 2
    run = jax.jit(lambda p, x: reduced_logits(DECODER, p, x, IMAGE, [Stage(2, 4, prior_tr)]))
    reduced, indices = run(params, embedded)
    block = sites["blocks"]["0"]
    seen = Seen(embedded, block["resid_post"][1], block["mixer"]["q"][1], block["mixer"]["k"][1], IMAGE, 0.5)
    expected = kept(prior_tr(seen), IMAGE, 4)
    assert indices.tolist() == expected.tolist()
    last = jax.tree.map(lambda a: a[2], params["blocks"]["0"])
    x, positions = gather((block["resid_post"][1], jnp.tile(jnp.arange(9), (2, 1))), expected)
    y, _ = BlockModule(DECODER.pattern[0], 16, 3, DECODER.initializer).apply({"params": last}, x, Context(positions))
    alone = DECODER.norm.build().apply({"params": params["norm"]}, y) @ params["head"]["kernel"]
    evidence.record(np.abs(reduced - alone).max(), 3e-5)


def test_reduction_refuses_what_it_cannot_score(decoder):
    params, _, sites = decoder
    other = Decoder(vocab=13, d_model=16, layers=1, pattern=(Block(mixer=MLA()),))
    with pytest.raises(ValueError, match="Attention"):
        reduced_logits(other, params, sites["embedded"], IMAGE, [])
    with pytest.raises(ValueError, match="ascend"):
        reduced_logits(DECODER, params, sites["embedded"], IMAGE, [Stage(2, 1, prior_tr), Stage(1, 1, prior_tr)])


@evidence("A51", oracle="scipy truncnorm", code="llmjax.nn.ada_q.truncated_gaussian")
@pytest.mark.parametrize(("mean", "std"), [(20.5, 4.0), (2.5, 9.0), (97.5, 30.0)])
def test_frames_are_quantiles_of_a_truncated_gaussian(mean, std, evidence):
    low, high = bounds(jnp.float32(mean), jnp.float32(std), 100)
    q = (np.arange(12) + 0.5) / 12
    expected = truncnorm((float(low) - mean) / std, (float(high) - mean) / std, mean, std).ppf(q)
    evidence.record(np.abs(truncated_gaussian(jnp.asarray(q), mean, std, low, high) - expected).max(), 1e-3)


@evidence("A51", oracle="laws of a peaked and a flat query", code="llmjax.nn.ada_q")
@pytest.mark.parametrize("peak", [0, 70, 199])
def test_a_local_query_is_answered_nearby_and_a_global_one_everywhere(peak, evidence):
    """200 frames, 8 of them. Peaked: within 3 standard deviations of the peak. Flat: within a frame of uniform."""
    local = jnp.zeros(200).at[peak].set(1.0)
    mean, std = spread(local, 8, 0.05)
    frames = np.asarray(jax.jit(lambda s: ada_q(s, 8))(local))
    assert len(set(frames.tolist())) == 8
    assert (np.diff(frames) > 0).all()
    assert peak in frames or np.abs(frames - peak).min() <= 1
    evidence.record(np.abs(frames + 0.5 - float(mean)).max(), 3 * float(std) + 0.5)
    assert 3 * float(std) <= 9
    flat = np.asarray(ada_q(jnp.full(200, 0.3), 8))
    evidence.record(np.abs(flat - (np.arange(8) + 0.5) * 25).max(), 1.0)


def test_frames_never_repeat():
    """As many frames as there are: all of them; crowded ones move to free places; too many are refused."""
    assert ada_q(normal(6), 6).tolist() == list(range(6))
    assert distinct(jnp.asarray([3, 3, 3, 4]), jnp.float32(2), jnp.float32(6)).tolist() == [2, 3, 4, 5]
    assert distinct(jnp.asarray([1, 1, 5, 9]), jnp.float32(0), jnp.float32(10)).tolist() == [1, 2, 5, 9]
    with pytest.raises(ValueError, match="7 frames"):
        ada_q(normal(6), 7)
