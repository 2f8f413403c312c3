"""Next-token loss against optax on dense logits, and the laws that padding, weights and bytes obey."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.metric import Metric, add
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.router import TopK
from llmjax.objectives.next_token import NextToken
from llmjax.train.step import apply_of
from tests.evidence import evidence


def means(metrics):
    return {name: metric.mean() for name, metric in metrics.items()}


MODEL = Decoder(vocab=31, d_model=16, layers=1)
APPLY = apply_of(MODEL.build())


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: a * 10, MODEL.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(1), 4)
    return {
        "tokens": jax.random.randint(keys[0], (2, 9), 0, 31),
        "targets": jax.random.randint(keys[1], (2, 9), 0, 31),
        "loss_mask": jax.random.bernoulli(keys[2], 0.7, (2, 9)).astype(jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(9), (2, 9)),
        "segment_ids": jnp.ones((2, 9), jnp.int32),
        "target_bytes": jax.random.randint(keys[3], (2, 9), 0, 6),
    }


@evidence("E01", oracle="optax integer-label cross-entropy", code="llmjax.objectives.next_token")
@pytest.mark.parametrize("chunk", [None, 4])
def test_loss_is_the_masked_mean(params, batch, chunk, evidence):
    loss, metrics = jax.jit(lambda p: NextToken(chunk=chunk, z_loss=1e-3).loss(APPLY, p, batch, None))(params)
    logits = MODEL.build().apply({"params": params}, batch["tokens"])[0]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    z = 1e-3 * jax.nn.logsumexp(logits, axis=-1) ** 2
    mask = batch["loss_mask"]
    got = means(metrics)
    expected = {
        "loss": float(jnp.sum(mask * (nll + z)) / mask.sum()),
        "nll": float(jnp.sum(mask * nll) / mask.sum()),
        "z_loss": float(jnp.sum(mask * z) / mask.sum()),
        "accuracy": float(jnp.sum(mask * (logits.argmax(-1) == batch["targets"])) / mask.sum()),
        "bits_per_byte": float(jnp.sum(mask * nll) / math.log(2) / jnp.sum(mask * batch["target_bytes"])),
    }
    assert got.keys() == expected.keys()
    evidence.record(max(abs(got[k] - expected[k]) for k in expected), 1e-5)
    np.testing.assert_allclose(loss, got["loss"], rtol=1e-6)


@evidence("A35", oracle="the routers' own logits, layer by layer", code="llmjax.objectives.next_token")
def test_losses_of_layers_count_once_a_token(batch, evidence):
    """Losses are summed over layers, metrics averaged; a batch without targets has no loss of any kind."""
    layer = MoE(4, GLU(d_ff=8), TopK(2), capacity=0.8, balance_loss=0.5, z_loss=0.1)
    block = Block(mixer=Attention(heads=1), mlp=layer)
    model = Decoder(vocab=31, d_model=16, layers=2, pattern=(block,), unroll=1)
    params = jax.tree.map(lambda a: a * 10, model.init(jax.random.key(0)))
    run = jax.jit(lambda p, b: NextToken(chunk=None).loss(apply_of(model.build()), p, b, None))
    loss, metrics = run(params, batch)
    capture = jax.jit(lambda p: model.build().apply({"params": p}, batch["tokens"], mutable=["sites"])[1]["sites"])
    closed = {"balance_loss": 0.0, "router_z_loss": 0.0, "max_load": 0.0}
    for logits in np.asarray(capture(params)["blocks"]["0"]["mlp"]["router_logits"], np.float64):
        exp = np.exp(logits)
        load = np.bincount(np.argsort(-logits, axis=-1)[..., :2].reshape(-1), minlength=4) / (2 * 9 * 2)
        closed["balance_loss"] += 0.5 * 4 * (load * (exp / exp.sum(-1, keepdims=True)).mean((0, 1))).sum()
        closed["router_z_loss"] += 0.1 * (np.log(exp.sum(-1)) ** 2).mean()
        closed["max_load"] += 4 * load.max() / 2
    got = means(metrics)
    evidence.record(max(abs(got[name] / value - 1) for name, value in closed.items()), 1e-5)
    assert 0 < got["dropped"] < 1
    total = got["nll"] + got["balance_loss"] + got["router_z_loss"]
    np.testing.assert_allclose([loss, got["loss"]], total, rtol=1e-6)
    empty, metrics = run(params, {**batch, "loss_mask": jnp.zeros((2, 9))})
    assert empty == 0
    assert all(metric.total == 0 for metric in metrics.values())


def test_a_model_of_dense_layers_hands_out_nothing(params, batch):
    features = jax.eval_shape(lambda p: APPLY(p, batch["tokens"], method="features"), params)
    assert (features.losses, features.metrics) == ({}, {})


@evidence("F14", oracle="the same rows without padding", code="llmjax.objectives.next_token")
def test_padding_does_not_count(params, batch, evidence):
    padded = {name: jnp.pad(x, ((0, 1), (0, 5))) for name, x in batch.items()}
    gradient = jax.jit(jax.grad(lambda p, b: NextToken(chunk=7).loss(APPLY, p, b, None)[0]))
    expected = gradient(params, batch)
    errors = jax.tree.map(
        lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), gradient(params, padded), expected
    )
    evidence.record(max(map(float, jax.tree.leaves(errors))), 1e-5)


@evidence("E14", oracle="ln V", code="llmjax.objectives.next_token")
def test_a_fresh_model_costs_log_vocab(batch, evidence):
    loss = jax.jit(lambda p: NextToken().loss(APPLY, p, batch, None)[0])(MODEL.init(jax.random.key(0)))
    evidence.record(abs(float(loss) / math.log(31) - 1), 0.02)


def test_nothing_to_learn_costs_nothing(params, batch):
    empty = {**batch, "loss_mask": jnp.zeros((2, 9))}
    run = jax.jit(jax.value_and_grad(lambda p: NextToken(chunk=4).loss(APPLY, p, empty, None)[0]))
    loss, gradient = run(params)
    assert loss == 0
    chex.assert_tree_all_finite(gradient)


def test_metrics_of_two_halves_are_those_of_the_whole(params, batch):
    run = jax.jit(lambda b: NextToken().loss(APPLY, params, b, None)[1])
    first, second = ({name: x[rows] for name, x in batch.items()} for rows in (slice(0, 1), slice(1, 2)))
    whole, parts = means(run(batch)), means(add(run(first), run(second)))
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_a_metric_without_a_count_is_nan():
    assert math.isnan(Metric(0.0, 0.0).mean())
