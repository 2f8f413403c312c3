"""Cross-attention, the encoder-decoder as a whole, and span corruption: closed forms, brute force, laws of caching."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from llmjax.config import ConfigError, InputError, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.encoder_decoder import EncoderDecoder, Tower
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mixer import Context, Memory
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.t5_bias import T5Bias
from llmjax.objectives.span_corruption import SpanCorruption
from llmjax.train.step import apply_of
from tests.evidence import evidence

pytestmark = pytest.mark.mixers

VOCAB, D, INIT = 31, 16, GPT2Init(std=0.2)
SHAPE = {"d_model": D, "layers": 2, "initializer": INIT, "unroll": 1}
HEADS = {"heads": 2, "head_dim": 6}


def towers(cross, order="pre", **fields):
    """Post-norm stacks rotate, pre-norm ones have T5's biases."""
    place, more = ({"rope": None}, {"distance": T5Bias(8, 12)}) if order == "pre" else ({}, {"norm": None})
    encoder = Block(Attention(causal=False, **HEADS, **place), GLU(d_ff=24), order=order)
    decoder = Block(Attention(**HEADS, **place), MLP(d_ff=24), order=order, cross=cross)
    stacks = (Tower(pattern=(block,), **SHAPE, **more) for block in (encoder, decoder))
    return EncoderDecoder(VOCAB, *stacks, **fields)


MODELS = {
    "t5": towers(CrossAttention(scale=1.0, **HEADS), scaled=True),
    "bart": towers(CrossAttention(kv_heads=2, bias=True, out_bias=True), "post", shared=False, tied=False),
}
EVERY = pytest.mark.parametrize("name", list(MODELS))
SOURCE, TARGET = (np.random.default_rng(n).integers(0, VOCAB, (2, n)).astype(np.int32) for n in (9, 7))
WHERE = np.where(np.arange(9) < [[9], [6]], np.arange(9), -1).astype(np.int32)


def shaken(params):
    """None of them zero."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.1 * random.standard_normal(a.shape).astype(np.float32), params)


@functools.cache
def params_of(model):
    validate(model)
    return shaken(model.init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def run(model, params, *arguments, method="__call__", **named):
    return model.build().apply({"params": params}, *arguments, method=method, **named)


def call(model, *arguments, **named):
    return run(model, params_of(model), *arguments, **named)


def close(one, other):
    """Float32 sums of tens of terms through four layers, relative to the largest value."""
    other = np.asarray(other)
    np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), rtol=0)


def read(config, x, memory, segment_ids=None):
    """Cross-attention alone: its output and its parameters."""
    module, context = config.build(D, 2, INIT), Context(jnp.zeros(x.shape[:2], jnp.int32), segment_ids, memory=memory)
    params = shaken(meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context)["params"]))
    return np.asarray(jax.jit(module.apply)({"params": params}, x, context)), params


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@evidence("A05", oracle="the value of a memory of one state", code="llmjax.nn.cross_attention")
def test_one_state_gives_its_value(evidence):
    """Whatever is asked. Three products of float32, sixteen terms each."""
    x, memory = normal(2, 5, D), normal(2, 1, D, seed=1)
    y, params = read(CrossAttention(kv_heads=2), x, Memory(jnp.asarray(memory)))
    value = np.einsum("bsd,dkh->bskh", memory, params["value"]["kernel"], dtype=np.float64).repeat(2, axis=2)
    expected = np.einsum("bskh,khd->bsd", value, params["out"]["kernel"])
    evidence.record(np.abs(y - expected).max() / np.abs(expected).max(), 1e-6)


@evidence("A05", oracle="loop over queries and heads in float64", code="llmjax.nn.cross_attention")
def test_it_is_the_softmax_over_the_document(evidence):
    """Two documents and padding in both rows; a query of a document without memory gets nothing."""
    x, memory = normal(2, 4, D), normal(2, 6, D, seed=1)
    asked, held = np.array([[1, 1, 2, 3], [1, 2, 2, -1]]), np.array([[1, 1, 2, 2, 2, -1], [2, -1, 1, 1, 2, 2]])
    y, p = read(CrossAttention(kv_heads=2, scale=0.7), x, Memory(jnp.asarray(memory), held), asked)
    q, k, v = (
        np.einsum("bsd,dkh->bskh", a, p[name]["kernel"], dtype=np.float64)
        for a, name in ((x, "query"), (memory, "key"), (memory, "value"))
    )
    expected = np.zeros((2, 4, D))
    for b, i, h in np.ndindex(2, 4, 4):
        seen = np.flatnonzero(held[b] == asked[b, i]) if asked[b, i] > 0 else []
        if len(seen):
            weights = np.exp(0.7 * k[b, seen, h // 2] @ q[b, i, h])
            expected[b, i] += (weights / weights.sum()) @ v[b, seen, h // 2] @ p["out"]["kernel"][h]
    present = asked > 0
    evidence.record(np.abs(y - expected)[present].max() / np.abs(expected).max(), 2e-6)


@evidence("A43", oracle="one full pass", code="llmjax.nn.encoder_decoder")
@EVERY
def test_cached_steps_equal_the_full_pass(name, evidence):
    """The source encoded once, with padding; the target four tokens at once, then one by one."""
    model = MODELS[name]
    full, _ = call(model, TARGET, source=SOURCE, source_positions=WHERE)
    memory = call(model, SOURCE, WHERE, method="encode")
    out, state = call(model, TARGET[:, :4], state=model.init_state(2, 8, jnp.float32), memory=memory)
    parts = [out]
    for i in range(4, 7):
        out, state = call(model, TARGET[:, i : i + 1], state=state, memory=memory)
        parts.append(out)
    evidence.record(np.abs(np.concatenate(parts, axis=1) - full).max() / np.abs(full).max(), 2e-6)


@EVERY
def test_only_the_present_source_and_the_past_are_seen(name):
    model = MODELS[name]
    full, _ = call(model, TARGET, source=SOURCE, source_positions=WHERE)
    noise = np.where(WHERE < 0, (SOURCE + 5) % VOCAB, SOURCE)
    np.testing.assert_array_equal(call(model, TARGET, source=noise, source_positions=WHERE)[0], full)
    seen = np.where(WHERE == 5, (SOURCE + 5) % VOCAB, SOURCE)
    assert (np.abs(call(model, TARGET, source=seen, source_positions=WHERE)[0] - full).max(axis=(1, 2)) > 1e-3).all()
    later = TARGET.copy()
    later[:, 4] = (later[:, 4] + 1) % VOCAB
    changed = np.abs(call(model, later, source=SOURCE, source_positions=WHERE)[0] - full).max(axis=(0, 2))
    assert (changed[:4] == 0).all()
    assert changed[4] > 1e-3


@EVERY
def test_packed_pairs_equal_separate_ones(name):
    """Sources of 4 and 5 tokens, targets of 3 and 4: each target reads its own source."""
    model = MODELS[name]
    places = [np.r_[np.arange(a), np.arange(b)][None].repeat(2, 0) for a, b in ((4, 5), (3, 4))]
    ids = [np.repeat([[1, 2]], [a, b], axis=1).repeat(2, 0) for a, b in ((4, 5), (3, 4))]
    source = {"source": SOURCE, "source_positions": places[0], "source_segment_ids": ids[0]}
    packed, _ = call(model, TARGET, places[1], ids[1], **source)
    close(packed[:, :3], call(model, TARGET[:, :3], source=SOURCE[:, :4])[0])
    close(packed[:, 3:], call(model, TARGET[:, 3:], source=SOURCE[:, 4:])[0])


def test_what_does_not_fit_is_one_line():
    model = MODELS["t5"]
    plain = dataclasses.replace(model.decoder, pattern=(Block(cross=None),), distance=None)
    wide = dataclasses.replace(model.encoder, d_model=24)
    future = dataclasses.replace(model.decoder, pattern=(model.encoder.pattern[0], model.decoder.pattern[0]))
    for changes, message in (
        ({"decoder": plain}, "decoder.pattern reads nothing of the encoder"),
        ({"encoder": wide}, "decoder.d_model=16 must be that of the encoder, 24"),
        ({"encoder": model.decoder}, "encoder.pattern.0.cross reads the states of an encoder"),
        ({"decoder": future}, "decoder.pattern.0 sees later tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(dataclasses.replace(model, **changes))
    with pytest.raises(ConfigError, match="has no place in order=parallel"):
        validate(Block(order="parallel", cross=CrossAttention()))
    with pytest.raises(ValueError, match="give an encoder-decoder a source"):
        call(model, TARGET)


OBJECTIVE = SpanCorruption(sentinel=30, end=20, chunk=None)


@pytest.mark.parametrize(("length", "rate", "span"), [(40, 0.15, 3.0), (33, 0.5, 1.0), (64, 0.3, 5.0), (2, 0.15, 3.0)])
def test_the_target_put_back_into_the_source_is_the_row(length, rate, span):
    """The last row has padding from its middle on. Tokens are below 20, so that only sentinels are above."""
    objective = dataclasses.replace(OBJECTIVE, sentinel=99, rate=rate, span=span)
    tokens = np.random.default_rng(0).integers(0, 20, (8, length)).astype(np.int32)
    present = np.arange(length) < np.r_[np.full(7, length), max(length // 2, 1)][:, None]
    pair = jax.tree.map(np.asarray, jax.jit(objective.pair)(jax.random.key(0), tokens, present))
    noise, spans = objective.counts(length)
    for row in range(8):
        source, target = (
            x[row][places[row] >= 0].tolist()
            for x, places in ((pair.source, pair.source_positions), (pair.target, pair.target_positions))
        )
        assert target[-1:] in ([20], [])  # the last row may have no gap before its padding
        cut, mark = {}, None
        for token in target[:-1]:
            mark = token if token >= 20 else mark
            cut[mark] = [*cut.get(mark, ()), *([token] if token < 20 else [])]
        restored = [token for mark in source for token in (cut[mark] if mark >= 20 else [mark])]
        assert restored == tokens[row][present[row]].tolist()
        assert [mark for mark in source if mark >= 20] == [99 - k for k in range(len(cut))]
        if row < 7:
            assert (sum(map(len, cut.values())), len(cut)) == (noise, spans)
    assert len({tuple(row) for row in pair.source.tolist()}) == 8 or length == 2


def test_counts_are_those_of_the_paper():
    """15 % in spans of three: 512 tokens give 77 in 26 spans, so a source of 461 and a target of 103, and its end."""
    assert SpanCorruption().counts(512) == (77, 26)
    with pytest.raises(InputError, match="rows of 1 token"):
        SpanCorruption().counts(1)


def test_the_loss_is_that_of_the_targets():
    """optax on dense logits of the same pair; padding of the target has no weight. Gradients reach every parameter."""
    model = MODELS["t5"]
    tokens = np.random.default_rng(0).integers(0, 20, (3, 24)).astype(np.int32)
    positions = np.where(np.arange(24) < [[24], [24], [11]], np.arange(24), -1)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones((3, 24), np.int32)}
    loss = lambda p: OBJECTIVE.loss(apply_of(model.build()), p, batch, jax.random.key(2))
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params_of(model))
    draws = jax.random.fold_in(jax.random.key(2), tokens.sum())
    pair = OBJECTIVE.pair(draws, tokens, positions >= 0)
    inputs = np.concatenate([np.full((3, 1), 20, np.int32), pair.target[:, :-1]], axis=1)
    source = {"source": pair.source, "source_positions": pair.source_positions}
    logits, _ = call(model, inputs, pair.target_positions, **source)
    there = np.asarray(pair.target_positions) >= 0
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, pair.target)
    np.testing.assert_allclose(value, np.sum(nll * there) / there.sum(), rtol=1e-5)
    assert metrics["nll"].count == there.sum() < there.size
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_sentinels_must_have_rows_of_their_own():
    model, tokens = MODELS["t5"], np.zeros((1, 24), np.int32)
    batch = {"tokens": tokens, "positions": tokens, "segment_ids": tokens}
    for sentinel in (31, 20):
        objective = dataclasses.replace(OBJECTIVE, sentinel=sentinel)
        with pytest.raises(InputError, match=f"sentinel={sentinel} must be below the 31 ids"):
            jax.eval_shape(lambda p, o=objective: o.loss(apply_of(model.build()), p, batch, None), params_of(model))
