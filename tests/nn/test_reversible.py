"""Reversible layers: the inverse, the gradient against autodiff, the memory of the compiled program."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError, InputError, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.decoder import Decoder
from llmjax.nn.encoder import Encoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.masks import Window
from llmjax.nn.mixer import Context
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.moe import MoE
from llmjax.nn.reversible import branches_of, reversible
from llmjax.nn.t5_bias import T5Bias
from tests.evidence import evidence

pytestmark = pytest.mark.mixers

INIT = GPT2Init(std=0.2)
BLOCKS = (
    Block(Attention(heads=2, rope=None), GLU(d_ff=24), order="reversible", dropout=0.3),
    Block(Attention(heads=2, rope=None, mask=Window(3)), MLP(d_ff=24), order="reversible", dropout=0.3),
)
MODEL = Decoder(
    vocab=29,
    d_model=16,
    layers=4,
    pattern=BLOCKS,
    distance=T5Bias(8, 12),
    remat="reversible",
    initializer=INIT,
)
TOKENS = jax.random.randint(jax.random.key(7), (2, 11), 0, 29)
PLACES = (jnp.asarray([[*range(4), *range(7)]] * 2), jnp.asarray([[1] * 4 + [2] * 7] * 2))


@pytest.fixture(scope="module")
def params():
    validate(MODEL)
    random = np.random.default_rng(0)
    shake = lambda a: a + 0.1 * random.standard_normal(a.shape).astype(np.float32)
    return jax.tree.map(shake, MODEL.init(jax.random.key(0)))


def logits(model, params, *arguments, **named):
    return model.build().apply({"params": params}, TOKENS, *arguments, **named)[0]


def branches(params):
    """The pairs of branches, variables and dropout keys of all repeats, two streams that differ, packed documents."""
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 2))
    streams = tuple(jax.random.normal(jax.random.key(n), (2, 11, 16)) for n in (2, 3))
    layers = ({"params": params["blocks"]}, keys)
    return branches_of(BLOCKS, 16, 4, INIT), layers, streams, Context(*PLACES, deterministic=False)


def by_hand(pairs, layers, streams, context):
    """The layers one after the other, without a scan."""
    one, two = streams
    for repeat in range(2):
        layer = jax.tree.map(lambda leaf, i=repeat: leaf[i], layers)
        for mix, feed in pairs:
            one = one + mix(layer, two, context)
            two = two + feed(layer, one, context)
    return one, two


@evidence("A37", oracle="the streams that went in", code="llmjax.nn.reversible")
def test_the_inverse_gives_the_inputs_back(params, evidence):
    """Four layers there and back: each rounds to 6e-8 of streams that have grown to tens."""
    pairs, layers, streams, context = branches(params)

    def back(one, two):
        for repeat in reversed(range(2)):
            layer = jax.tree.map(lambda leaf, i=repeat: leaf[i], layers)
            for mix, feed in reversed(pairs):
                two = two - feed(layer, one, context)
                one = one - mix(layer, two, context)
        return one, two

    there = jax.jit(lambda s: reversible(pairs, layers, s, context))(streams)
    assert min(float(jnp.abs(a - b).max()) for a, b in zip(there, streams, strict=True)) > 1
    errors = [jnp.abs(a - b).max() for a, b in zip(jax.jit(back)(*there), streams, strict=True)]
    evidence.record(max(errors), 1e-5)


@evidence("A37", oracle="jax autodiff of the layers one by one", code="llmjax.nn.reversible")
def test_the_gradient_is_that_of_autodiff(params, evidence):
    """With the dropout of the forward pass. Reconstruction adds some 1e-6 of the largest value to the sums."""
    pairs, layers, streams, context = branches(params)

    def graded(function):
        def loss(variables, streams):
            one, two = function(pairs, (variables, layers[1]), streams, context)
            return jnp.sum(jnp.sin(one) * two)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(layers[0], streams)

    (value, gradients), (expected, others) = graded(reversible), graded(by_hand)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(others))
    for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        evidence.record(jnp.abs(one - two).max() / scale, 1e-5)


def test_the_model_is_the_same_however_its_gradient_is_made(params):
    """Values and all gradients, the distance table's and the embeddings' too, with and without reconstruction."""

    def graded(remat):
        model = dataclasses.replace(MODEL, remat=remat, unroll=1)
        loss = lambda p: jnp.sum(jnp.sin(logits(model, p, *PLACES)))
        return jax.jit(jax.value_and_grad(loss))(params)

    (value, gradients), (expected, others) = graded("reversible"), graded("none")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert float(jnp.abs(others["distance"]["embedding"]).max()) > 1e-3
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(others))
    chex.assert_trees_all_close(gradients, others, atol=2e-5 * scale, rtol=0)


@evidence("A37", oracle="compiled memory_analysis at 4, 8 and 16 layers", code="llmjax.nn.reversible")
def test_memory_does_not_grow_with_depth(evidence):
    """Temporary bytes of a gradient, relative to those of 4 layers; what autodiff keeps grows with every layer."""

    def temporary(layers, remat):
        block = Block(Attention(heads=2), GLU(d_ff=32), order="reversible")
        model = Decoder(vocab=29, d_model=16, layers=layers, pattern=(block,), remat=remat, unroll=1)
        tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
        loss = lambda p, t: jnp.sum(jnp.sin(model.build().apply({"params": p}, t)[0]))
        return jax.jit(jax.grad(loss)).lower(model.abstract(), tokens).compile().memory_analysis().temp_size_in_bytes

    four = temporary(4, "reversible")
    for layers in (8, 16):
        evidence.record(abs(temporary(layers, "reversible") / four - 1), 0.01)
    assert temporary(8, "none") > 1.5 * temporary(4, "none") > 1.5 * four


def test_cached_steps_equal_the_full_pass_and_sites_are_open(params):
    full = jax.jit(lambda p: logits(MODEL, p))(params)
    step = jax.jit(lambda p, t, s: MODEL.build().apply({"params": p}, t, state=s))
    out, state = step(params, TOKENS[:, :6], MODEL.init_state(2, 16, jnp.float32))
    parts = [out]
    for i in range(6, 11):
        out, state = step(params, TOKENS[:, i : i + 1], state)
        parts.append(out)
    scale = float(jnp.abs(full).max())
    chex.assert_trees_all_close(jnp.concatenate(parts, axis=1), full, atol=2e-5 * scale)

    @jax.jit
    def captured(params, edits):
        variables = {"params": params, "interventions": edits}
        (out, _), found = MODEL.build().apply(variables, TOKENS, mutable=["sites"])
        return out, found["sites"]

    out, sites = captured(params, {})
    chex.assert_trees_all_close(out, full, atol=2e-5 * scale)
    assert sites["blocks"]["1"]["resid_post"].shape == (2, 2, 11, 16)
    zero = {"blocks": {"0": {"resid_mid": {"mask": jnp.ones((2, 1, 1, 1), bool), "value": jnp.zeros((2, 1, 1, 1))}}}}
    without = jax.jit(lambda p: MODEL.build().apply({"params": p, "interventions": zero}, TOKENS)[0])(params)
    chex.assert_trees_all_close(without, captured(params, zero)[0], atol=2e-5 * scale)
    assert jnp.abs(without - full).max() > 1e-3 * scale


def test_encoders_can_be_reversible_too():
    block = Block(Attention(causal=False), order="reversible")
    model = Encoder(vocab=29, d_model=16, layers=2, pattern=(block,), remat="reversible")
    validate(model)
    loss = lambda p: jnp.sum(logits(model, p))
    chex.assert_tree_all_finite(jax.jit(jax.grad(loss))(model.init(jax.random.key(0))))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Decoder(remat="reversible"), "remat=reversible needs order=reversible in every block"),
        (Decoder(pattern=(Block(), BLOCKS[0])), "pattern.0.order=pre must be reversible"),
        (Decoder(pattern=(Block(mlp=None, order="reversible"),)), "mlp=None is the second stream's branch"),
        (Block(order="reversible", cross=CrossAttention()), "has no place in order=reversible"),
    ],
)
def test_wirings_that_cannot_be_reversed_are_one_line(model, message):
    with pytest.raises(ConfigError, match=message):
        validate(model)


def test_losses_of_layers_are_not_lost_in_silence():
    block = Block(mlp=MoE(experts=2, expert=GLU(d_ff=8)), order="reversible")
    model = Decoder(vocab=29, d_model=16, layers=1, pattern=(block,), remat="reversible")
    module = model.build()
    with pytest.raises(InputError, match="use remat=full"):
        jax.eval_shape(lambda p: module.apply({"params": p}, TOKENS), model.abstract())
