"""The attention-only model against the sum over its paths, a turned residual basis, and a Markov chain's entropy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.config import ConfigError, validate
from llmjax.models.attention_only import attention_only
from llmjax.nn.block import Block
from tests.evidence import evidence

VOCAB, LENGTH, WIDTH = 11, 12, 16
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(2, LENGTH))
CODE = "llmjax.models.attention_only"


def params_of(model):
    """Initial weights times 1.5: attention that is far from uniform."""
    return jax.tree.map(lambda w: 1.5 * w, model.init(jax.random.key(1)))


def logits_and_sites(model, params):
    """Logits, and what the sites hold, from one compiled forward pass."""
    run = jax.jit(lambda p: model.build().apply({"params": p}, jnp.asarray(TOKENS), mutable=["sites"]))
    (logits, _), captured = run(params)
    return np.asarray(logits, np.float64), captured["sites"]


def patterns(sites, heads):
    """softmax(q k^T / sqrt(head_dim)) over the past in float64: `[layers, heads, batch, length, length]`."""
    q, k = (np.asarray(sites["blocks"]["0"]["mixer"][name], np.float64) for name in "qk")
    scores = np.einsum("lbqhd,lbkhd->lhbqk", q, k) / np.sqrt(WIDTH // heads)
    weights = np.where(np.tri(LENGTH, dtype=bool), np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return weights / weights.sum(-1, keepdims=True)


@evidence("D14", oracle="sum over all paths: direct, heads' OV, virtual heads (Elhage 2021)", code=CODE)
@pytest.mark.parametrize(("layers", "heads"), [(0, 2), (1, 4), (2, 2), (3, 2)])
def test_logits_are_the_sum_over_paths(layers, heads, evidence):
    """(1 + heads)^layers products in float64. Float32 rounds sums of 16 terms: 1e-6 of the largest logit."""
    model = attention_only(layers, WIDTH, heads, VOCAB)
    params = params_of(model)
    logits, sites = logits_and_sites(model, params)
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    embedded, unembed = weights["embed"]["embedding"][TOKENS], weights["head"]["kernel"]
    if layers:
        mixer, moved = weights["blocks"]["0"]["mixer"], patterns(sites, heads)
        ov = np.einsum("ldhe,lhem->lhdm", mixer["value"]["kernel"], mixer["out"]["kernel"])
    total, paths = np.zeros_like(logits), 0
    for choice in itertools.product((None, *range(heads)), repeat=layers):
        attention, circuit = np.eye(LENGTH), np.eye(WIDTH)
        for layer, head in enumerate(choice):
            if head is not None:
                attention, circuit = moved[layer, head] @ attention, circuit @ ov[layer, head]
        total, paths = total + attention @ embedded @ circuit @ unembed, paths + 1
    assert paths == (1 + heads) ** layers
    direct = np.abs(logits - embedded @ unembed).max()
    assert (direct > 0.1 * np.abs(logits).max()) == (layers > 0), "the heads must matter, or nothing is tested"
    evidence.record(np.abs(logits - total).max() / np.abs(logits).max(), 1e-6)


@evidence("D14", oracle="the residual stream has no basis of its own", code=CODE)
def test_a_turned_residual_stream_gives_the_same_logits(evidence):
    """W_E R, R^T W_QKV, W_O R, R^T W_U for an orthogonal R. Float32 rounding: 1e-6 of the largest logit."""
    model = attention_only(2, WIDTH, 4, VOCAB)
    params = params_of(model)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    mixer = params["blocks"]["0"]["mixer"]
    read = {
        name: {"kernel": np.einsum("dm,ldhe->lmhe", turn, mixer[name]["kernel"])} for name in ("query", "key", "value")
    }
    turned_mixer = {**read, "out": {"kernel": mixer["out"]["kernel"] @ turn}}
    turned = {
        "embed": {"embedding": params["embed"]["embedding"] @ turn},
        "blocks": {"0": {"mixer": turned_mixer}},
        "head": {"kernel": turn.T @ params["head"]["kernel"]},
    }
    assert jax.tree.structure(turned) == jax.tree.structure(params), "no other weights: they would have to turn too"
    before, after = logits_and_sites(model, params)[0], logits_and_sites(model, turned)[0]
    evidence.record(np.abs(after - before).max() / np.abs(before).max(), 1e-6)


@evidence("D14", oracle="conditional entropy of a Markov chain (closed form)", code=CODE)
def test_without_layers_training_reaches_the_bigram(evidence):
    """The excess of the true cross-entropy over -sum_i pi_i sum_j P_ij log P_ij, which no table goes below.

    In expectation V (V - 1) / (2 N) nats for the best table of N pairs, 0.0013 here; three times that is allowed.
    """
    states, rows, length, steps = 6, 64, 180, 300
    random = np.random.default_rng(3)
    chain = random.dirichlet(np.full(states, 0.5), size=states) * 0.97 + 0.03 / states
    stationary = np.linalg.matrix_power(chain, 500)[0]
    text = [random.integers(states, size=rows)]
    for _ in range(length):
        text.append((random.random((rows, 1)) > np.cumsum(chain[text[-1]], axis=1)[:, :-1]).sum(axis=1))
    tokens = np.stack(text, axis=1)
    model = attention_only(0, 8, 2, states)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def loss(params):
        logits, _ = model.build().apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    params = train(model.init(jax.random.key(0)))
    table = np.asarray(params["embed"]["embedding"], np.float64) @ np.asarray(params["head"]["kernel"], np.float64)
    table -= np.log(np.exp(table).sum(axis=1, keepdims=True))
    reached, entropy = (-(stationary[:, None] * chain * logs).sum() for logs in (table, np.log(chain)))
    assert -(stationary * np.log(stationary)).sum() > entropy + 0.3, "one letter must tell something about the next"
    assert reached >= entropy
    evidence.record(reached - entropy, 3 * states * (states - 1) / (2 * rows * length))


def test_what_does_not_fit_is_refused():
    """Heads that do not divide the width, and blocks whose wiring is made of norms."""
    validate(attention_only(0, 8, 2, 5))
    with pytest.raises(ConfigError, match=r"heads=3 does not divide d_model=8"):
        validate(attention_only(1, 8, 3, 5))
    for order in ("post", "branch", "sandwich", "parallel_norms", "reversible"):
        with pytest.raises(ConfigError, match=f"norm=None leaves nothing of order={order}"):
            validate(Block(norm=None, order=order))
