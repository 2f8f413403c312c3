"""Attention with a memory: Memorizing Transformer, recurrent memory, landmarks.

Tolerances are of float32 sums of some tens of terms, relative to the largest value, unless said otherwise.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn import query_blocks
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.landmark import landmark_attention
from llmjax.nn.masks import Chunked
from llmjax.nn.memorizing import MemorizingAttention, recall
from llmjax.nn.recurrent_memory import recurrent_memory
from llmjax.nn.scores import Scores, Tokens
from llmjax.nn.stack import enter, scanned
from tests.evidence import evidence
from tests.mixers.cases import D_MODEL, forward
from tests.mixers.drawn import drawn, normals

TOLERANCE = 3e-6
LENGTH = 14


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.isfinite(ours).all()
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def whole(mixer, params, x):
    """The mixer on rows without padding."""
    return forward(mixer, params, x, np.broadcast_to(np.arange(x.shape[1]), x.shape[:2]), None)


def scores_on(q, k, v, scale=1.0):
    """The scores of rows without padding."""
    tokens = Tokens(jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2]))
    return Scores(q, k, v, tokens, tokens, scale=scale)


RECALL = jax.jit(lambda q, k, v, *sizes: recall(scores_on(q, k, v), *sizes), static_argnums=(3, 4, 5))


@evidence("A20", oracle="attention inside the segment, where the gate is 0", code="llmjax.nn.memorizing")
def test_a_closed_gate_leaves_local_attention(evidence):
    mixer = MemorizingAttention(heads=2, segment=4, retrieved=2)
    params, x = drawn(mixer), normal(2, LENGTH, D_MODEL)
    local = {name: params[name] for name in ("query", "key", "value", "out")}
    expected = whole(Attention(heads=2, mask=Chunked(4)), local, x)
    closed = whole(mixer, {**params, "gate": np.full(2, -1e9, np.float32)}, x)
    evidence.record(error(closed, expected), TOLERANCE)
    assert error(whole(mixer, params, x), expected) > 0.01
    opened = np.asarray(whole(mixer, {**params, "gate": np.full(2, 1e9, np.float32)}, x))
    assert not opened[:, :4].any()  # the first segment has no memory
    assert np.abs(opened[:, 4:]).min(-1).max() > 0.01


@evidence("A20", oracle="jax.nn.dot_product_attention over the memory", code="llmjax.nn.memorizing")
def test_retrieving_the_whole_memory_is_dense_attention(evidence):
    """Tokens 5 to 7 before the segment, of 14: `memory` forgets the older ones."""
    q, k, v = (normal(2, LENGTH, 2, 4, seed=seed) for seed in range(3))
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    mask = (j < i // 5 * 5) & (j >= i // 5 * 5 - 7)
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None], scale=1.0)
    expected = np.where(mask.any(1)[:, None, None], expected, 0)
    evidence.record(error(RECALL(q, k, v, 5, 7, 7), expected), TOLERANCE)


@evidence("A20", oracle="argsort and softmax as loops in numpy", code="llmjax.nn.memorizing")
def test_the_best_tokens_of_the_memory_are_retrieved(evidence):
    q, k, v = (normal(1, LENGTH, 2, 4, seed=seed) for seed in range(3))
    expected = np.zeros(q.shape)
    for i in range(4, LENGTH):
        for h in range(2):
            scores = k[0, : i // 4 * 4, h] @ q[0, i, h]
            best = np.argsort(-scores)[:3]
            expected[0, i, h] = softmax(scores[best]) @ v[0, best, h]
    evidence.record(error(RECALL(q, k, v, 4, 100, 3), expected), TOLERANCE)


def test_no_gradient_goes_into_the_memory():
    """The last segment's output depends on the first one's values, but has no derivative by them."""
    q, k, v = (normal(1, LENGTH, 2, 4, seed=seed) for seed in range(3))

    def last(q, k, v):
        return jnp.sum(jnp.sin(RECALL(q, k, v, 4, 100, 3)[:, 12:]))

    value, gradients = jax.jit(jax.value_and_grad(last, (0, 1, 2)))(q, k, v)
    assert np.abs(gradients[0]).max() > 0.01
    assert not np.abs(gradients[1]).any()
    assert not np.abs(gradients[2]).any()
    assert abs(last(q, k, v + np.float32(1)) - value) > 0.01


def test_blocks_of_queries_are_joined():
    """5 queries at a time, values and gradients, against all 14 at once."""
    q, k = normal(2, LENGTH, 2, 4), normal(2, LENGTH, 2, 4, seed=1)

    def value(block):
        def total(q):
            def one(part):
                return jnp.einsum("blhd,bshd->blhs", part[0], k) * (part[1][..., None, None] >= 3), part[0]

            pairs, copy = query_blocks.by_queries(one, (q, jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))), block)
            return jnp.sum(jnp.sin(pairs)) + jnp.sum(copy**2)

        return jax.jit(jax.value_and_grad(total))(q)

    (one, one_gradient), (two, two_gradient) = value(5), value(LENGTH)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    np.testing.assert_allclose(one_gradient, two_gradient, atol=1e-5)


@evidence("A21", oracle="the stack on each segment by itself", code="llmjax.nn.recurrent_memory")
def test_without_memory_every_segment_stands_alone(evidence):
    """The blocks of a decoder of two layers."""
    model = Decoder(vocab=7, d_model=16, layers=2, pattern=(Block(Attention(heads=2), mlp=None),))
    params = normals(model.abstract())["blocks"]

    def stack(x):
        context, _ = enter(x[..., 0], None, None, None)
        return scanned(model)(model).apply({"params": params}, x, context, None)[0]

    x = normal(2, 12, 16)
    y, memory = jax.jit(lambda x: recurrent_memory(stack, x, jnp.zeros((2, 0, 16)), 4))(x)
    alone = jax.jit(stack)(x.reshape(6, 4, 16)).reshape(2, 12, 16)
    assert memory.shape == (2, 0, 16)
    evidence.record(error(y, alone), TOLERANCE)


@evidence(
    "A21",
    oracle="a Python loop over the segments, and its gradients",
    code="llmjax.nn.recurrent_memory",
)
@pytest.mark.parametrize("unroll", [None, 2])
def test_memory_is_carried_and_gradients_are_truncated(unroll, evidence):
    """Of four segments; with windows of two, the third one's memory comes from the second but has no derivative."""
    x, start, kernel = normal(1, 12, 8), normal(1, 2, 8, seed=1), normal(8, 8, seed=2)

    def stack(x):
        return jnp.tanh(jnp.cumsum(x @ kernel, axis=1) / jnp.arange(1, 8)[:, None])

    def ours(x, start):
        y, memory = recurrent_memory(stack, x, start, 3, unroll)
        return jnp.sum(jnp.sin(y[:, 9:])), (y, memory)

    def loop(x, start):
        memory, parts = start, []
        for s in range(4):
            if unroll and s == 2:
                memory = jax.lax.stop_gradient(memory)
            y = stack(jnp.concatenate([memory, x[:, 3 * s : 3 * s + 3], memory], axis=1))
            memory, parts = y[:, 5:], [*parts, y[:, 2:5]]
        y = jnp.concatenate(parts, axis=1)
        return jnp.sum(jnp.sin(y[:, 9:])), (y, memory)

    ((_, (y, memory)), gradients), ((_, (expected, last)), expected_gradients) = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, start) for f in (ours, loop)
    )
    evidence.record(error(y, expected), TOLERANCE)
    evidence.record(error(memory, last), TOLERANCE)
    evidence.record(error(gradients[0], expected_gradients[0]), 10 * TOLERANCE)
    assert np.abs(gradients[0][:, 6:9]).max() > 1e-3
    assert np.abs(gradients[0][:, :6]).any() == (unroll is None)
    assert np.abs(gradients[1]).any() == (unroll is None)


def test_segments_must_divide_the_length():
    with pytest.raises(ValueError, match="length 12 is not a multiple of segment=5"):
        recurrent_memory(jnp.tanh, jnp.zeros((1, 12, 16)), jnp.zeros((1, 2, 16)), 5)


LANDMARK = jax.jit(
    lambda q, k, v, size, best: landmark_attention(scores_on(q, k, v), size, best), static_argnums=(3, 4)
)


@evidence("A22", oracle="the grouped softmax as loops in numpy", code="llmjax.nn.landmark")
@pytest.mark.parametrize("best", [None, 2])
def test_landmark_attention_equals_the_grouped_softmax(best, evidence):
    """Blocks of two tokens and a landmark."""
    q, k, v = (normal(2, LENGTH, 2, 4, seed=seed) for seed in range(3))
    expected = np.zeros(q.shape)
    for b, i, h in np.ndindex(2, LENGTH, 2):
        s, own = k[b, :, h] @ q[b, i, h], i // 3
        near = [j for j in range(3 * own, i + 1) if j % 3 != 2]
        marks = [3 * n + 2 for n in range(own)]
        marks = sorted(marks, key=lambda j: -s[j])[:best]
        weights = softmax(s[near + marks])
        expected[b, i, h] = weights[: len(near)] @ v[b, near, h]
        for weight, mark in zip(weights[len(near) :], marks, strict=True):
            inside = [mark - 2, mark - 1]
            expected[b, i, h] += weight * softmax(s[inside]) @ v[b, inside, h]
    evidence.record(error(LANDMARK(q, k, v, 3, best), expected), TOLERANCE)


@evidence("A22", oracle="jax.nn.dot_product_attention", code="llmjax.nn.landmark")
@pytest.mark.parametrize("best", [None, 7])
def test_landmarks_that_score_like_their_blocks_give_dense_attention(best, evidence):
    """Blocks of one token and a landmark with the same key, all retrieved: attention to all tokens but landmarks."""
    q, k, v = (normal(2, LENGTH, 2, 4, seed=seed) for seed in range(3))
    k[:, 1::2] = k[:, ::2]
    mask = np.tril(np.ones((LENGTH, LENGTH), bool)) & (np.arange(LENGTH) % 2 == 0)
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None], scale=1.0)
    evidence.record(error(LANDMARK(q, k, v, 2, best), expected), TOLERANCE)


def test_operations_are_those_of_the_pairs():
    """Counted by hand for 6 tokens in segments or blocks of 2: keys seen, remembered, retrieved."""
    mixer = MemorizingAttention(heads=1, head_dim=4, segment=2, memory=3, retrieved=2)
    local, remembered, retrieved = 9 / 6, (0 + 0 + 2 + 2 + 3 + 3) / 6, 8 / 6
    assert np.isclose(mixer.mixing_flops(8, 6), 8 * (2 * local + remembered + retrieved))
    assert np.isclose(replace(mixer, retrieved=9).mixing_flops(8, 6), 8 * (2 * local + 2 * remembered))
