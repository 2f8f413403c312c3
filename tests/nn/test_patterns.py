"""Stacks of different layers, and attention's smaller options. Float32 rounding of a few sums unless said."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba import Mamba
from llmjax.nn.masks import Chunked, Window
from tests.evidence import evidence
from tests.mixers import cases
from tests.mixers.cases import D_MODEL, INIT, params_of

TOKENS = jax.random.randint(jax.random.key(7), (2, 12), 0, 29)
X = np.random.default_rng(0).standard_normal((2, 12, D_MODEL)).astype(np.float32)
apply = jax.jit(cases.apply, static_argnums=0)


def decoder(*mixers, layers=4):
    pattern = tuple(Block(mixer=mixer, mlp=None) for mixer in mixers)
    return Decoder(vocab=29, d_model=D_MODEL, layers=layers, pattern=pattern, initializer=INIT)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.build().apply({"params": params}, TOKENS)[0]


def regrouped(params, count):
    """Parameters of a pattern of one block as those of a pattern of `count` such blocks."""
    stacked = params["blocks"]["0"]
    blocks = {str(i): jax.tree.map(lambda a, i=i: a[i::count], stacked) for i in range(count)}
    return {**params, "blocks": blocks}


@evidence("A09", oracle="the dense stack", code="llmjax.nn.decoder")
def test_windows_as_wide_as_the_text_are_a_dense_stack(evidence):
    plain, mixed = decoder(Attention()), decoder(Attention(), Attention(mask=Window(12)))
    params = plain.init(jax.random.key(0))
    expected = logits(plain, params)
    evidence.record(jnp.max(jnp.abs(logits(mixed, regrouped(params, 2)) - expected)), 1e-5)
    narrow = decoder(Attention(), Attention(mask=Window(3)))
    assert jnp.max(jnp.abs(logits(narrow, regrouped(params, 2)) - expected)) > 1e-3


@evidence("B16", oracle="the decoder stack of one kind of block", code="llmjax.nn.decoder")
def test_a_pattern_of_equal_blocks_is_the_stack(evidence):
    plain, pattern = decoder(Attention()), decoder(*4 * (Attention(),))
    params = plain.init(jax.random.key(0))
    evidence.record(jnp.max(jnp.abs(logits(pattern, regrouped(params, 4)) - logits(plain, params))), 1e-5)


@evidence("B16", oracle="its blocks one after the other by hand", code="llmjax.nn.block")
def test_a_hybrid_runs_its_blocks_in_order(evidence):
    mixers = (Mamba(d_state=4, expand=1), Mamba(d_state=4, expand=1), Attention())
    model = dataclasses.replace(decoder(*mixers, layers=3), norm=None)
    params = model.init(jax.random.key(0))
    x = params["embed"]["embedding"][TOKENS]
    for i, mixer in enumerate(mixers):
        block = jax.tree.map(lambda a: a[0], params["blocks"][str(i)])
        root = jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + model.pattern[0].norm.eps)
        x = x + apply(mixer, block["mixer"], x / root * block["mixer_norm"]["scale"])
    evidence.record(jnp.max(jnp.abs(logits(model, params) - x @ params["head"]["kernel"])), 1e-5)


@evidence("A13", oracle="every segment alone", code="llmjax.nn.masks")
def test_chunks_are_sequences_of_their_own(evidence):
    mixer = Attention(mask=Chunked(5), rope=None)
    params = params_of(mixer)
    alone = [apply(Attention(rope=None), params, X[:, part]) for part in (slice(0, 5), slice(5, 10), slice(10, 12))]
    error = jnp.max(jnp.abs(apply(mixer, params, X) - jnp.concatenate(alone, axis=1)))
    whole = apply(Attention(mask=Chunked(12), rope=None), params, X) - apply(Attention(rope=None), params, X)
    evidence.record(max(error, jnp.max(jnp.abs(whole))), 1e-5)


@evidence("A23", oracle="a softmax with one more column, and plain attention at -inf", code="llmjax.nn.attention")
@pytest.mark.parametrize("sink", [-jnp.inf, 0.7])
def test_a_sink_is_one_more_score(sink, evidence):
    plain = Attention(heads=2, rope=None)
    params = params_of(plain)
    q, k, v = (np.einsum("bld,dhk->blhk", X, params[name]["kernel"]) for name in ("query", "key", "value"))
    scores = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((12, 12), bool)), scores, -np.inf)
    weights = np.exp(scores) / (np.exp(scores).sum(-1, keepdims=True) + np.exp(sink))
    expected = np.einsum("bhij,bjhk,hkd->bid", weights, v, params["out"]["kernel"])
    got = apply(dataclasses.replace(plain, sinks=True), {**params, "sinks": jnp.full(2, sink)}, X)
    evidence.record(np.max(np.abs(got - expected)), 2e-5)


@evidence("A26", oracle="permutation equivariance", code="llmjax.nn.attention")
def test_without_positions_order_is_not_seen(evidence):
    mixer, order = Attention(causal=False, rope=None), np.random.default_rng(1).permutation(12)
    params = params_of(mixer)
    evidence.record(jnp.max(jnp.abs(apply(mixer, params, X[:, order]) - apply(mixer, params, X)[:, order])), 1e-5)
    causal = Attention(rope=None)
    assert jnp.max(jnp.abs(apply(causal, params, X[:, order]) - apply(causal, params, X)[:, order])) > 1e-3
