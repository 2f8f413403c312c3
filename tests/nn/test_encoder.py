"""The encoder as a whole: every layer that sees the future, padding, packing, symmetry, pooling, masked prediction."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.config import ConfigError, InputError, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.decoder import Decoder
from llmjax.nn.encoder import Encoder
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.moe import MoE
from llmjax.nn.norms import LayerNorm
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.router import ExpertChoice
from llmjax.objectives.masked import Masked
from llmjax.train.step import apply_of
from tests.evidence import evidence
from tests.mixers.cases import CASES, D_MODEL, INIT

VOCAB = 31
NOT_CAUSAL = {name: Block(mixer=mixer, mlp=None) for name, mixer in CASES.items() if mixer.sees_future()}
EXPERTS = Block(mlp=MoE(experts=2, expert=GLU(d_ff=8), router=ExpertChoice(1.0), balance_loss=0.0))
BERT = Encoder(
    vocab=VOCAB,
    d_model=D_MODEL,
    layers=2,
    pattern=(Block(Attention(causal=False, rope=None, bias=True), MLP(d_ff=24), LayerNorm(), "post"),),
    norm=None,
    positions=LearnedPositions(32),
    embedding_norm=LayerNorm(),
    token_types=2,
    pooler=True,
    initializer=INIT,
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)


@functools.cache
def params_of(model):
    """Parameters, shaken so that none is zero."""
    validate(model)
    params, random = model.init(jax.random.key(0)), np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.1 * random.standard_normal(a.shape).astype(np.float32), params)


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, *arguments):
    return model.build().apply({"params": params}, *arguments, method="encode")


def close(one, other):
    """Float32 sums of tens of terms through two layers, relative to the largest value."""
    other = np.asarray(other)
    np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), rtol=0)


@pytest.mark.mixers
@pytest.mark.parametrize("name", list(NOT_CAUSAL))
def test_mixers_that_see_the_future_run_here(name):
    """A later token changes an earlier state; documents, packed or padded, are what they are alone."""
    model = Encoder(vocab=VOCAB, d_model=D_MODEL, layers=1, pattern=(NOT_CAUSAL[name],), initializer=INIT)
    params, row, a, b = params_of(model), TOKENS[0], np.arange(5), np.arange(7)
    changed = row.copy()
    changed[4] = (row[4] + 1) % VOCAB
    other = np.r_[row[:5], (row[5:] + 3) % VOCAB]
    tokens = np.stack([row, changed, other])
    positions = np.stack([np.r_[a, b], np.r_[a, b], np.r_[a, -np.ones(7, int)]]).astype(np.int32)
    segments = np.stack([np.r_[0 * a, 0 * b + 1]] * 2 + [np.zeros(12, int)]).astype(np.int32)
    states = np.asarray(encode(model, params, tokens, positions, segments).states)
    assert np.isfinite(states).all()
    assert np.abs(states[1, 0] - states[0, 0]).max() > 1e-6
    np.testing.assert_array_equal(states[1, 5:], states[0, 5:])
    close(states[2, :5], states[0, :5])


def test_experts_that_choose_their_tokens_run_here():
    """They choose among the whole row; what padding holds changes nothing."""
    model = Encoder(vocab=VOCAB, d_model=D_MODEL, layers=1, pattern=(EXPERTS,), initializer=INIT)
    positions = np.stack([np.r_[np.arange(9), -1, -1, -1]] * 2).astype(np.int32)
    tokens = np.stack([TOKENS[0], np.r_[TOKENS[0, :9], (TOKENS[0, 9:] + 1) % VOCAB]])
    states = np.asarray(encode(model, params_of(model), tokens, positions).states)
    close(states[1, :9], states[0, :9])
    later = np.repeat(tokens[:1], VOCAB, axis=0)
    later[:, 8] = np.arange(VOCAB)
    states = np.asarray(encode(model, params_of(model), later, np.repeat(positions[:1], VOCAB, axis=0)).states)
    assert np.ptp(states[:, :8], axis=0).max() > 1e-3


@pytest.mark.parametrize("name", [*NOT_CAUSAL, "experts"])
def test_a_decoder_refuses_them(name):
    model = Decoder(d_model=D_MODEL, pattern=(NOT_CAUSAL.get(name, EXPERTS),))
    with pytest.raises(ConfigError, match="give it to an Encoder"):
        validate(model)


@evidence("A42", oracle="the same tokens in another order", code="llmjax.nn.encoder")
def test_without_positions_states_move_with_their_tokens(evidence):
    """Permutation equivariance. Float32 sums in another order through two layers, relative to the largest value."""
    model = dataclasses.replace(BERT, positions=None, pooler=False)
    order = np.random.default_rng(2).permutation(12)
    states = np.asarray(encode(model, params_of(model), TOKENS).states)
    moved = np.asarray(encode(model, params_of(model), TOKENS[:, order]).states)
    evidence.record(np.abs(moved - states[:, order]).max() / np.abs(states).max(), 2e-6)


@pytest.mark.mixers
def test_types_and_the_pooled_first_token():
    """The pooled state is tanh(W x + b) of the first token that is present, wherever padding stands."""
    params = params_of(BERT)
    types = np.repeat([[0, 1]], 6, axis=1).reshape(1, 12).repeat(2, 0)
    plain, typed = encode(BERT, params, TOKENS), encode(BERT, params, TOKENS, None, None, True, types)
    assert np.abs(plain.states - typed.states).max() > 1e-3
    close(typed.pooled, np.tanh(np.asarray(typed.states[:, 0]) @ params["pooler"]["kernel"] + params["pooler"]["bias"]))
    positions = np.stack([np.r_[-1, -1, -1, np.arange(9)]] * 2).astype(np.int32)
    shifted = encode(BERT, params, np.roll(TOKENS, 3, axis=1), positions)
    right = encode(BERT, params, TOKENS, np.stack([np.r_[np.arange(9), -1, -1, -1]] * 2).astype(np.int32))
    close(shifted.pooled, right.pooled)
    close(shifted.states[:, 3:], right.states[:, :9])


@pytest.mark.mixers
def test_rows_are_told_apart_by_the_pooled_state():
    model = dataclasses.replace(BERT, row_classes=3)
    params = params_of(model)
    found = encode(model, params, TOKENS)
    close(found.row_logits, np.asarray(found.pooled) @ params["row_head"]["kernel"] + params["row_head"]["bias"])
    assert encode(BERT, params_of(BERT), TOKENS).row_logits is None
    with pytest.raises(ConfigError, match="row_classes=3 are told apart by the pooled state"):
        validate(dataclasses.replace(model, pooler=False))


def batch_of(tokens, positions=None):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    return {"tokens": tokens, "positions": positions.astype(np.int32), "segment_ids": np.ones(tokens.shape, np.int32)}


@evidence("A42", oracle="binomial distribution, five standard deviations", code="llmjax.objectives.masked")
def test_masking_statistics(evidence):
    """15 % are chosen; of these 80 % are masked, 10 % drawn from the vocabulary (1 in 1000 as it was), 10 % left."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (400, 500)).astype(np.int32))
    objective = Masked(mask_id=1000, vocab=1000)
    present = jnp.arange(500) < 450
    corrupted, chosen = jax.jit(objective.corrupt)(jax.random.key(0), tokens, present & jnp.ones((400, 1), bool))
    corrupted, chosen = np.asarray(corrupted), np.asarray(chosen)
    assert not chosen[:, 450:].any()
    np.testing.assert_array_equal(corrupted[~chosen], tokens[~chosen])
    hidden, same = (corrupted == 1000)[chosen], (corrupted == tokens)[chosen]
    drawn = corrupted[chosen][~hidden & ~same]
    shares = {
        "chosen": (chosen[:, :450].mean(), 0.15, 400 * 450),
        "hidden": (hidden.mean(), 0.8, chosen.sum()),
        "same": (same.mean(), 0.1 + 0.1 / 1000, chosen.sum()),
        "low half": ((drawn < 500).mean(), 0.5, len(drawn)),
    }
    for share, p, count in shares.values():
        evidence.record(abs(share - p) / math.sqrt(p * (1 - p) / count), 5)


@pytest.mark.mixers
def test_the_loss_is_that_of_the_chosen_tokens():
    """optax on dense logits of the same corruption; without a key the corruption is that of the batch."""
    objective, model = Masked(mask_id=30, vocab=30, chunk=5), dataclasses.replace(BERT, pooler=False)
    params, positions = params_of(model), np.where(np.arange(12) < [[12], [9]], np.arange(12), -1)
    batch = batch_of(TOKENS % 30, positions)
    run = jax.jit(lambda p, key: objective.loss(apply_of(model.build()), p, batch, key))
    value, metrics = run(params, jax.random.key(3))
    draws = jax.random.fold_in(jax.random.key(3), jnp.sum(batch["tokens"]))
    corrupted, chosen = objective.corrupt(draws, batch["tokens"], positions >= 0)
    logits = jax.jit(lambda p: model.build().apply({"params": p}, corrupted, batch["positions"])[0])(params)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"])
    np.testing.assert_allclose(value, jnp.sum(nll * chosen) / chosen.sum(), rtol=1e-5)
    assert metrics["nll"].count == chosen.sum() > 0
    evaluate = jax.jit(lambda b: objective.loss(apply_of(model.build()), params, b, None)[0])
    assert evaluate(batch) == evaluate(batch)
    assert evaluate(batch) != evaluate(batch_of((TOKENS + 1) % 30, positions))


@pytest.mark.mixers
def test_it_learns_what_a_masked_token_was():
    """Rows of one token: a gap is what its neighbours are."""
    objective, model = Masked(mask_id=30, vocab=30, chunk=None), dataclasses.replace(BERT, pooler=False, token_types=0)
    apply, optimizer = apply_of(model.build()), optax.adam(3e-3)
    rows = np.random.default_rng(0).integers(0, 30, (120, 16, 1)).repeat(12, axis=2).astype(np.int32)
    where = batch_of(rows[0])

    def step(carry, inputs):
        tokens, key = inputs
        loss = lambda p: objective.loss(apply, p, where | {"tokens": tokens}, key)[0]
        value, gradient = jax.value_and_grad(loss)(carry[0])
        updates, state = optimizer.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), state), value

    params, keys = model.init(jax.random.key(0)), jax.random.split(jax.random.key(1), len(rows))
    _, losses = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), (rows, keys)))(params)
    assert losses[:3].mean() > 3
    assert losses[-10:].mean() < 1


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ConfigError, match=r"pattern.0.cross reads the states of an encoder"):
        validate(dataclasses.replace(BERT, pattern=(Block(cross=CrossAttention()),)))
    with pytest.raises(InputError, match="no decode state"):
        BERT.init_state(1, 8, jnp.float32)
    with pytest.raises(InputError, match="mask_id=31 is beyond the 31 ids"):
        Masked(mask_id=31).loss(apply_of(BERT.build()), params_of(BERT), batch_of(TOKENS), None)
