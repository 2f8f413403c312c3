"""Attention that is more than a mask: differences, shared heads, slots, additive scores, hash buckets; permutations.

Tolerances are of float32 sums of some tens of terms, relative to the largest value, unless said otherwise.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.additive_attention import AdditiveAttention, additive_attention
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.differential import DifferentialAttention
from llmjax.nn.gqa import pool_kv_heads
from llmjax.nn.hyper_attention import HyperAttention, hyper_attention
from llmjax.nn.linear_attention import LinearAttention
from llmjax.nn.linformer import Linformer
from llmjax.nn.lsh_attention import by_mask, by_sorting, hashes, unit
from llmjax.nn.rope import Rope
from llmjax.nn.scores import Scores, Tokens
from tests.evidence import evidence
from tests.mixers.cases import D_MODEL, forward
from tests.mixers.drawn import drawn, normals

TOLERANCE = 3e-6
LENGTH = 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.isfinite(ours).all()
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def whole(mixer, params, x):
    """The mixer on rows without padding."""
    return forward(mixer, params, x, np.broadcast_to(np.arange(x.shape[1]), x.shape[:2]), None)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def test_differential_attention_equals_the_equations_as_loops():
    mixer = DifferentialAttention(heads=2, kv_heads=1, rope=None, initial=0.5)
    params = drawn(mixer)
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), params), normal(LENGTH, D_MODEL).astype(np.float64)
    rates = np.exp((p["weight_query"] * p["weight_key"]).sum(-1))
    y, v = np.zeros((LENGTH, D_MODEL)), x @ p["value"]["kernel"][:, 0]
    for h in range(2):
        for i in range(LENGTH):
            first, second = (
                softmax((x[: i + 1] @ p["key"]["kernel"][:, n]) @ (x[i] @ p["query"]["kernel"][:, 2 * h + n]) / 2)
                for n in (0, 1)
            )
            z = (first - (rates[0] - rates[1] + 0.5) * second) @ v[: i + 1]
            z = z / np.sqrt(np.mean(z * z) + 1e-5) * p["norm"]["scale"]
            y[i] += 0.5 * z @ p["out"]["kernel"][h]
    assert error(whole(mixer, params, x[None].astype(np.float32))[0], y) < 10 * TOLERANCE  # the difference cancels


@pytest.fixture(scope="module")
def trained():
    """A model of four heads, its parameters, tokens, and logits as a function of both."""
    model = Decoder(vocab=17, d_model=16, layers=2, pattern=(Block(Attention(bias=True), mlp=None),))
    params = normals(model.abstract())
    tokens = np.random.default_rng(1).integers(0, 17, (2, 9))
    logits = jax.jit(lambda model, params: model.build().apply({"params": params}, tokens)[0], static_argnums=0)
    return model, params, logits


@evidence("A04", oracle="unchanged where the heads of a group are equal", code="llmjax.nn.gqa")
def test_pooling_equal_heads_changes_nothing(trained, evidence):
    model, params, logits = trained
    equal = dict(params["blocks"])
    for i, layer in equal.items():
        sides = {
            name: jax.tree.map(lambda a: np.repeat(a[..., ::2, :], 2, axis=-2), layer["mixer"][name])
            for name in ("key", "value")
        }
        equal[i] = {**layer, "mixer": {**layer["mixer"], **sides}}
    params = {**params, "blocks": equal}
    pooled, fewer = pool_kv_heads(model, params, 2)
    assert jax.tree.map(np.shape, fewer) == jax.tree.map(lambda a: a.shape, pooled.abstract())
    evidence.record(error(logits(pooled, fewer), logits(model, params)), TOLERANCE)


@evidence("A04", oracle="numpy means of the heads' slices", code="llmjax.nn.gqa")
def test_pooling_takes_means(trained, evidence):
    model, params, _ = trained
    _, fewer = pool_kv_heads(model, params, 2)
    worst = 0.0
    for i, layer in params["blocks"].items():
        for name in ("key", "value"):
            for part, old in layer["mixer"][name].items():
                new = fewer["blocks"][i]["mixer"][name][part]
                means = [(old[..., 2 * g, :] + old[..., 2 * g + 1, :]) / 2 for g in (0, 1)]
                worst = max(worst, np.abs(np.asarray(new) - np.stack(means, axis=-2)).max())
    evidence.record(worst, 1e-7)
    with pytest.raises(ValueError, match="kv_heads=3 does not divide the 4 of pattern.0"):
        pool_kv_heads(model, params, 3)


@evidence("A17", oracle="jax.nn.dot_product_attention, where E = F = identity", code="llmjax.nn.linformer")
def test_linformer_with_as_many_slots_as_tokens(evidence):
    mixer = Linformer(heads=2, rank=LENGTH, length=LENGTH)
    params = {**drawn(mixer), "key_slots": np.eye(LENGTH), "value_slots": np.eye(LENGTH)}
    x = normal(2, LENGTH, D_MODEL)
    q, k, v = (np.einsum("bld,dhe->blhe", x, params[name]["kernel"]) for name in ("query", "key", "value"))
    expected = np.einsum("blhe,hed->bld", jax.nn.dot_product_attention(q, k, v), params["out"]["kernel"])
    evidence.record(error(whole(mixer, params, x), expected), TOLERANCE)


def test_linformer_of_rows_with_one_document_and_with_several():
    """The linear and the quadratic form: a row alone (linear), and beside a packed one (quadratic)."""
    mixer = Linformer(heads=2, rank=3, length=16)
    x, positions = normal(2, 12, D_MODEL), np.stack([np.arange(12), np.r_[0:5, 0:7]])
    positions[0, 10:] = -1
    segments = np.where(positions < 0, -1, np.stack([np.zeros(12, int), np.r_[[0] * 5, [1] * 7]]))
    both = forward(mixer, drawn(mixer), x, positions, segments)
    alone = forward(mixer, drawn(mixer), x[:1], positions[:1], segments[:1])
    assert error(both[0, :10], alone[0, :10]) < TOLERANCE


@evidence("A07", oracle="the mean of the values where W = U = 0", code="llmjax.nn.additive_attention")
def test_additive_attention_without_scores_is_the_mean(evidence):
    mixer = AdditiveAttention(heads=2)
    params = drawn(mixer)
    params = {**params, **{name: {"kernel": np.zeros_like(params[name]["kernel"])} for name in ("query", "key")}}
    x = normal(2, LENGTH, D_MODEL)
    means = np.cumsum(x, axis=1) / np.arange(1, LENGTH + 1)[:, None]
    expected = np.einsum("bld,dhe,hef->blf", means, params["value"]["kernel"], params["out"]["kernel"])
    evidence.record(error(whole(mixer, params, x), expected), TOLERANCE)


@evidence("A07", oracle="the equation as loops in numpy", code="llmjax.nn.additive_attention")
def test_additive_attention_equals_the_equation(evidence):
    """A decoder's 21 states over an encoder's 6, of which some are not seen: more than a block of queries."""
    q, k, v, w = normal(1, 21, 2, 4), normal(1, 6, 2, 4, seed=1), normal(1, 6, 2, 5, seed=2), normal(2, 4, seed=3)
    seen = np.random.default_rng(4).random((1, 21, 6)) < 0.7
    seen[0, 3] = False
    expected = np.zeros((1, 21, 2, 5))
    for i in range(21):
        for h in range(2):
            where = np.flatnonzero(seen[0, i])
            if len(where):
                weights = softmax(np.array([w[h] @ np.tanh(q[0, i, h] + k[0, j, h]) for j in where]))
                expected[0, i, h] = weights @ v[0, where, h]
    evidence.record(error(jax.jit(additive_attention)(q, k, v, w, seen), expected), TOLERANCE)


FREE = [
    Attention(causal=False, rope=None),
    AdditiveAttention(causal=False),
    DifferentialAttention(heads=2, causal=False, rope=None),
    LinearAttention(causal=False),
]


@evidence("A44", oracle="random permutations", code="llmjax.nn.attention")
@pytest.mark.parametrize("mixer", FREE, ids=lambda mixer: type(mixer).__name__)
def test_without_mask_and_positions_permuted_tokens_give_permuted_outputs(mixer, evidence):
    """P f(x) = f(P x); with a causal mask or positions it is not so."""
    x = normal(3, LENGTH, D_MODEL)
    orders = np.argsort(np.random.default_rng(1).random((3, LENGTH)), axis=1)[..., None]
    permuted = np.take_along_axis(x, orders, axis=1)
    broken = [dataclasses.replace(mixer, causal=True)]
    if isinstance(mixer, Attention):
        broken.append(dataclasses.replace(mixer, rope=Rope()))
    params = drawn(mixer)
    y = np.take_along_axis(np.asarray(whole(mixer, params, x)), orders, axis=1)
    evidence.record(error(whole(mixer, params, permuted), y), TOLERANCE)
    for other in broken:
        y = np.take_along_axis(np.asarray(whole(other, params, x)), orders, axis=1)
        assert error(whole(other, params, permuted), y) > 0.01


def lsh(form, q, v, codes, ids, reach):
    """Either form on rows whose documents are `ids`."""
    if form == "sorted":
        return by_sorting(q, v, codes, ids, reach)
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    tokens = Tokens(positions, ids)
    return by_mask(Scores(q, unit(q), v, tokens, tokens), codes, codes, v, reach)


LSH = jax.jit(lsh, static_argnums=(0, 5))
FORMS = pytest.mark.parametrize("form", ["sorted", "dense"])


@FORMS
@evidence("A18", oracle="sets of keys and softmax as loops in numpy", code="llmjax.nn.lsh_attention")
def test_lsh_attention_is_a_softmax_over_the_union_of_buckets(form, evidence):
    """Two documents and padding, three rounds, at most 3 tokens back in a bucket; the first of a bucket sees itself."""
    length, reach = 23, 3
    q, v = normal(2, length, 2, 4), normal(2, length, 2, 4, seed=1)
    codes = np.random.default_rng(2).integers(0, 3, (2, length, 2, 3)).astype(np.int32)
    ids = np.stack([np.r_[[5] * 9, [7] * 12, [-1] * 2], np.r_[[-1] * 4, [0] * 19]]).astype(np.int32)
    expected = np.zeros(q.shape)
    for b, i, h in np.ndindex(2, length, 2):
        keys = set()
        for r in range(3):
            same = [j for j in range(i) if ids[b, j] == ids[b, i] and codes[b, j, h, r] == codes[b, i, h, r]]
            keys |= set(same[-reach:])
        keys = sorted(keys) or [i]
        units = q[b, keys, h] / (2 * np.sqrt(np.mean(q[b, keys, h] ** 2, axis=-1, keepdims=True) + 1e-6))
        expected[b, i, h] = softmax(units @ q[b, i, h]) @ v[b, keys, h]
    ours = LSH(form, q, v, codes, ids, reach)
    there = ids >= 0
    evidence.record(error(np.asarray(ours)[there], expected[there]), TOLERANCE)


@FORMS
@evidence("A18", oracle="dense attention with shared queries and keys", code="llmjax.nn.lsh_attention")
def test_lsh_attention_of_one_bucket_is_dense(form, evidence):
    """In every one of two rounds; the token itself hidden, except from the first."""
    length = 12
    q, v = normal(1, length, 2, 4), normal(1, length, 2, 4, seed=1)
    k = q / (2 * np.sqrt(np.mean(q**2, axis=-1, keepdims=True) + 1e-6))
    mask = np.tril(np.ones((length, length), bool), -1)
    mask[0, 0] = True
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None], scale=1.0)
    ours = LSH(form, q, v, np.zeros((1, length, 2, 2), np.int32), np.zeros((1, length), np.int32), length)
    evidence.record(error(ours, expected), TOLERANCE)


@evidence("A18", oracle="collision probability 1 - angle / pi of two buckets", code="llmjax.nn.lsh_attention")
def test_collisions_of_hashes(evidence):
    """20,000 rounds: four standard deviations are 4 sqrt(1/4 / 20,000) = 0.014. The length of x changes no hash."""
    angles, rounds = np.linspace(0.2, 3.0, 8), 20_000
    x = np.stack([np.cos(np.r_[0, angles]), np.sin(np.r_[0, angles]), 0 * np.r_[0, angles]], axis=1)
    scaled = (x * np.arange(1, 10)[:, None]).astype(np.float32)
    codes = np.asarray(hashes(scaled[None, :, None], jax.random.normal(jax.random.key(0), (1, 3, rounds, 1))))
    met = (codes[0, 1:, 0] == codes[0, :1, 0]).mean(-1)
    evidence.record(np.abs(met - (1 - angles / np.pi)).max(), 0.014)


def hyper(q, k, v, block, draws, seed=0, hashed=True):
    """`hyper_attention` on rows of one document, with 4 planes of this seed; not hashed, in the order of positions."""
    normals = hashed * jax.random.normal(jax.random.key(seed), (q.shape[2], q.shape[3], 4))
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return hyper_attention(q, k, v, positions, None, normals, draws, block)


HYPER = jax.jit(hyper, static_argnums=3)


@evidence("A19", oracle="jax.nn.dot_product_attention", code="llmjax.nn.hyper_attention")
def test_hyper_attention_of_one_block_is_dense(evidence):
    q, k, v = (normal(2, LENGTH, 2, 4, seed=seed) for seed in range(3))
    expected = jax.nn.dot_product_attention(q, k, v)
    evidence.record(error(HYPER(q, k, v, LENGTH, np.float32([0.1, 0.5])), expected), TOLERANCE)


def test_hyper_attention_of_rows_with_one_document_and_with_several():
    """Padding before a document; the same row alone (linear), and beside a packed one (quadratic)."""
    mixer = HyperAttention(heads=2, block=3, samples=4, planes=2)
    x, positions = normal(2, 12, D_MODEL), np.stack([np.r_[[-1] * 3, 0:9], np.r_[0:5, 0:7]])
    segments = np.where(positions < 0, -1, np.stack([np.zeros(12, int), np.r_[[0] * 5, [1] * 7]]))
    both = forward(mixer, drawn(mixer), x, positions, segments)
    alone = forward(mixer, drawn(mixer), x[:1], positions[:1], segments[:1])
    assert error(both[0, 3:], alone[0, 3:]) < TOLERANCE


@evidence("A19", oracle="dense numerators and denominators, in the mean over draws", code="llmjax.nn.hyper_attention")
def test_hyper_attention_is_unbiased_over_the_draws(evidence):
    """16 tokens in blocks of 4, 6 draws. Values are unit vectors: out_ij is a_ij exp(s_ij) / D_i.

    In the query's own block a = 1, so that out gives D; the means of D and of a, over 4,000 draws, within five standard
    errors, the largest of 272.
    """
    q, k = normal(1, 16, 1, 4), normal(1, 16, 1, 4, seed=1)
    values = np.eye(16, dtype=np.float32)[None, :, None]
    draws = np.random.default_rng(2).random((4000, 6)).astype(np.float32)
    out = np.asarray(jax.jit(jax.vmap(lambda some: hyper(q, k, values, 4, some)[0, :, 0]))(draws), np.float64)
    scores = np.exp(q[0, :, 0].astype(np.float64) @ k[0, :, 0].T / 2)
    own = (out > 0).all(0)
    assert (own.sum(1) == 4).all()
    totals = np.stack([scores[i, own[i]][0] / out[:, i, own[i]][:, 0] for i in range(16)], axis=1)
    weights = out * totals[..., None] / scores
    for found, expected in ((totals, scores.sum(1)), (weights, np.ones((16, 16)))):
        errors = found.std(0) / np.sqrt(len(draws))
        evidence.record((np.abs(found.mean(0) - expected) / (5 * errors + 1e-5 * expected)).max(), 1)


@evidence("A19", oracle="dense attention on 8 clusters of directions", code="llmjax.nn.hyper_attention")
def test_sorted_hashes_find_large_entries(evidence):
    """Blocks of 32 among 128 tokens and 32 draws, 32 problems: sorting by hash takes a quarter off the error.

    The rest is from clusters of different size, by which queries and keys of one end in different blocks.
    """
    random = np.random.default_rng(0)
    centres, clusters = 6 * random.normal(size=(32, 8, 16)), random.integers(0, 8, (32, 128, 1))
    near = np.take_along_axis(centres, clusters, axis=1)
    q, k, v = ((a * near + random.normal(size=near.shape))[:, :, None].astype(np.float32) for a in (1, 1, 0))
    draws, dense = random.random((32, 32)).astype(np.float32), np.asarray(jax.nn.dot_product_attention(q, k, v))
    errors = []
    for hashed in (False, True):

        def one(q, k, v, draws, seed, hashed=hashed):
            return hyper(q[None], k[None], v[None], 32, draws, seed, hashed)[0]

        y = np.asarray(jax.jit(jax.vmap(one))(q, k, v, draws, np.arange(32)))
        errors.append(np.sqrt(np.mean((y - dense) ** 2)))
    evidence.record(errors[1] / errors[0], 0.75)
