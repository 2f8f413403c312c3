"""Heads: the mixture of softmaxes and its rank, multi-token prediction. Closed forms in float64, optax, causality."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.config import ConfigError, InputError, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import FanInInit, GPT2Init
from llmjax.nn.mlp import GLU
from llmjax.nn.model import Features
from llmjax.nn.multi_token import MultiToken
from llmjax.nn.softmax_mixture import Mixture, SoftmaxMixture, log_mixture
from llmjax.objectives.head import head_loss
from llmjax.objectives.multi_token import NextTokens
from llmjax.objectives.next_token import NextToken
from llmjax.train.step import apply_of
from tests.evidence import evidence

pytestmark = pytest.mark.mixers

D, VOCAB, K = 6, 40, 3
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


HIDDEN, KERNEL, MIXTURE = normal(2, 50, D), normal(D, VOCAB), Mixture(normal(D, K), normal(D, K, D))
TARGETS, WEIGHTS = RANDOM.integers(0, VOCAB, (2, 50)), RANDOM.random((2, 50)).astype(np.float32)


def probabilities(hidden, kernel, mixture, soft_cap=None):
    """The definition, component by component, in float64."""
    hidden, kernel, prior, latent = (np.asarray(a, np.float64) for a in (hidden, kernel, mixture.prior, mixture.latent))
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    weights, total = softmax(hidden @ prior), 0.0
    for k in range(K):
        logits = np.tanh(hidden @ latent[:, k]) @ kernel
        logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
        total = total + weights[..., k : k + 1] * softmax(logits)
    return total


@evidence("A40", oracle="sum of softmaxes in float64", code="llmjax.nn.softmax_mixture")
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_the_mixture_is_the_sum_of_its_softmaxes(soft_cap, evidence):
    """Log-probabilities of some nats, each rounded a few times to 6e-8 of its size."""
    logs = log_mixture(HIDDEN, KERNEL, MIXTURE, soft_cap)
    evidence.record(np.abs(logs - np.log(probabilities(HIDDEN, KERNEL, MIXTURE, soft_cap))).max(), 2e-5)


def rank(matrix):
    """Singular values above float32 rounding of the largest."""
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return int(np.sum(values > 1e-5 * values[0]))


@evidence("A40", oracle="numpy SVD of the matrix of log-probabilities", code="llmjax.nn.softmax_mixture")
def test_one_softmax_has_a_rank_that_the_mixture_exceeds(evidence):
    """100 contexts, 40 tokens, 6 features: at most 7 of one softmax (and 7 here), all 40 of a mixture of three."""
    one = jax.nn.log_softmax(HIDDEN.reshape(-1, D) @ KERNEL)
    evidence.record(abs(rank(one) - (D + 1)), 0)
    alone = Mixture(MIXTURE.prior[:, :1], MIXTURE.latent[:, :1])
    assert rank(log_mixture(HIDDEN.reshape(-1, D), KERNEL, alone)) == D + 1
    evidence.record(abs(rank(log_mixture(HIDDEN.reshape(-1, D), KERNEL, MIXTURE)) - VOCAB), 0)


@evidence("A40", oracle="optax on all logits at once", code="llmjax.objectives.head")
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("mixture", [None, MIXTURE], ids=["softmax", "mixture"])
def test_the_loss_in_chunks_is_that_of_all_logits(mixture, chunk, evidence):
    """Value, metrics and gradients of both heads, relative to the largest."""

    def loss(arrays):
        return head_loss(Features(*arrays[:2], mixture=arrays[2]), TARGETS, WEIGHTS, chunk)

    def whole(arrays):
        hidden, kernel, mixed = arrays
        logits = hidden @ kernel if mixed is None else log_mixture(hidden, kernel, mixed)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)
        return jnp.sum(WEIGHTS * nll) / WEIGHTS.sum(), jnp.sum(WEIGHTS * (logits.argmax(-1) == TARGETS))

    arrays = (HIDDEN, KERNEL, mixture)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    (expected, correct), other = jax.jit(jax.value_and_grad(whole, has_aux=True))(arrays)
    evidence.record(abs(value / expected - 1), 2e-6)
    evidence.record(abs(metrics["accuracy"].total / correct - 1), 1e-5)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        evidence.record(jnp.abs(one - two).max() / jnp.abs(two).max(), 1e-5)


def test_a_mixture_has_no_z_loss():
    with pytest.raises(ValueError, match="has no effect on a mixture"):
        head_loss(Features(HIDDEN, KERNEL, mixture=MIXTURE), TARGETS, WEIGHTS, z_loss=1e-4)


MODEL = Decoder(
    vocab=31,
    d_model=16,
    layers=2,
    pattern=(Block(Attention(heads=2), GLU(d_ff=24)),),
    multi_token=MultiToken(2, Block(Attention(heads=2), GLU(d_ff=24))),
    initializer=GPT2Init(0.2),
)
TOKENS = RANDOM.integers(0, 31, (2, 12)).astype(np.int32)
PLACES = np.r_[np.arange(5), np.arange(5), -1, -1][None].repeat(2, 0)
BATCH = {
    "tokens": TOKENS,
    "targets": np.roll(TOKENS, -1, axis=1),
    "loss_mask": (np.r_[np.ones(4), 0, np.ones(5), 0, 0][None] * [[1], [1]]).astype(np.float32),
    "positions": PLACES,
    "segment_ids": np.repeat([[1, 2, 0]], [5, 5, 2], axis=1).repeat(2, 0),
    "target_bytes": np.ones((2, 12), np.int32),
}


@functools.cache
def params_of(model):
    """Parameters, shaken so that none is zero."""
    validate(model)
    random = np.random.default_rng(1)
    shake = lambda a: a + 0.1 * random.standard_normal(a.shape).astype(np.float32)
    return jax.tree.map(shake, model.init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def features(model, params, *arguments):
    return model.build().apply({"params": params}, *arguments, method="features")[0]


def test_the_head_of_a_model_is_the_mixture():
    """Its logits are log-probabilities, cached steps and all."""
    model = dataclasses.replace(MODEL, multi_token=None, mixture=SoftmaxMixture(3))
    params = params_of(model)
    assert {"prior", "latent"} == set(params["mixture"])
    step = jax.jit(lambda p, t, s: model.build().apply({"params": p}, t, state=s))
    found = features(model, params, TOKENS)
    expected = np.log(probabilities(found.hidden, found.kernel, found.mixture))
    logits, _ = step(params, TOKENS, None)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    cached, state = step(params, TOKENS[:, :11], model.init_state(2, 12, jnp.float32))
    last, _ = step(params, TOKENS[:, 11:], state)
    np.testing.assert_allclose(np.concatenate([cached, last], axis=1), expected, atol=5e-5)


def test_each_step_of_the_chain_knows_one_token_more():
    """h_k at i: of the token at i + k, of none after it. The last entries of a row are of no token and left aside."""
    base = features(MODEL, params_of(MODEL), TOKENS)
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 31
    other = features(MODEL, params_of(MODEL), changed)
    for k in (1, 2):
        moved = np.abs(other.ahead[k - 1] - base.ahead[k - 1]).max(axis=(0, 2))[: 12 - k]
        assert (moved[: 7 - k] == 0).all()
        assert (moved[7 - k :] > 1e-4).all()


def test_a_chain_of_idle_blocks_is_its_projections():
    """Zero branches leave norm(W [norm(h); norm(e)]): two steps in float64."""
    model = dataclasses.replace(MODEL, initializer=FanInInit(embedding_std=1.0))
    params = model.init(jax.random.key(0))
    found = features(model, params, TOKENS)
    norm = lambda x: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    embedded = np.asarray(params["embed"]["embedding"], np.float64)[TOKENS]
    hidden = np.asarray(found.hidden, np.float64)
    for k in (1, 2):
        joined = np.concatenate([norm(hidden[:, :-1]), norm(embedded[:, k:])[:, : hidden.shape[1] - 1]], axis=-1)
        hidden = joined @ np.asarray(params["multi_token"][f"project_{k}"]["kernel"], np.float64)
        np.testing.assert_allclose(found.ahead[k - 1][:, : hidden.shape[1]], norm(hidden), atol=1e-5)


def test_the_loss_is_the_next_tokens_and_the_further_ones():
    """optax on dense logits of every pair of a place and a token k + 1 places on in the same document."""
    objective, params = NextTokens(chunk=None, weight=0.4), params_of(MODEL)
    value, metrics = jax.jit(lambda p: objective.loss(apply_of(MODEL.build()), p, BATCH, None))(params)
    found = features(MODEL, params, TOKENS, BATCH["positions"], BATCH["segment_ids"])
    expected = []
    for k, hidden in enumerate([found.hidden, *found.ahead]):
        places = [
            (b, i) for b in range(2) for i in range(12 - k) if BATCH["loss_mask"][b, i] and BATCH["loss_mask"][b, i + k]
        ]
        places = [(b, i) for b, i in places if BATCH["segment_ids"][b, i] == BATCH["segment_ids"][b, i + k]]
        rows, columns = np.transpose(places)
        targets = BATCH["targets"][rows, columns + k]
        nll = optax.softmax_cross_entropy_with_integer_labels((hidden @ found.kernel)[rows, columns], targets)
        expected.append(float(nll.mean()))
        assert metrics["nll" if k == 0 else f"nll_{k + 1}"].count == len(places) == 2 * (9 - 2 * k)
    np.testing.assert_allclose(value, expected[0] + 0.4 * (expected[1] + expected[2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].mean(), value, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"].mean(), expected[0], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: objective.loss(apply_of(MODEL.build()), p, BATCH, None)[0]))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_without_a_chain_there_is_nothing_to_predict_with():
    model = dataclasses.replace(MODEL, multi_token=None)
    with pytest.raises(InputError, match=r"predicts with model.multi_token"):
        jax.eval_shape(lambda p: NextTokens().loss(apply_of(model.build()), p, BATCH, None), model.abstract())
    for chain in (
        MultiToken(0),
        MultiToken(block=Block(Attention(causal=False))),
        MultiToken(block=Block(order="reversible")),
    ):
        with pytest.raises(ConfigError, match=r"multi_token\.(depth|block)"):
            validate(dataclasses.replace(MODEL, multi_token=chain))


def test_next_token_trains_every_head():
    """The mixture's loss is that of its own log-probabilities."""
    model = dataclasses.replace(MODEL, multi_token=None, mixture=SoftmaxMixture(3))
    loss, _ = jax.jit(lambda p: NextToken(chunk=5).loss(apply_of(model.build()), p, BATCH, None))(params_of(model))
    found = features(model, params_of(model), TOKENS, BATCH["positions"], BATCH["segment_ids"])
    probability = probabilities(found.hidden, found.kernel, found.mixture)
    nll = -np.log(np.take_along_axis(probability, BATCH["targets"][..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(loss, np.sum(nll * BATCH["loss_mask"]) / BATCH["loss_mask"].sum(), rtol=1e-5)
