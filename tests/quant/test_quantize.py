"""Quantising models: which parameters, what it costs, and what comes out."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from llmjax.config import InputError, from_dict, override, to_dict, validate
from llmjax.fields import ConfigError
from llmjax.models.gpt2 import gpt2
from llmjax.models.llama import llama2
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.moe import MoE
from llmjax.quant.awq import AWQ
from llmjax.quant.calibrate import calibrate
from llmjax.quant.gptq import GPTQ
from llmjax.quant.integers import Integer
from llmjax.quant.nf4 import NF4
from llmjax.quant.quantize import Override, Quantize, layer_by_layer, quantise
from llmjax.quant.report import errors, memory, rounding_errors
from llmjax.quant.tensor import QTensor
from tests.evidence import evidence

pytestmark = pytest.mark.adapters

MODEL = Decoder(vocab=19, d_model=16, layers=2, unroll=1)
TOKENS = np.random.default_rng(0).integers(0, 19, (3, 12))


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.build().apply({"params": params}, TOKENS)[0]


def stored(params):
    return {path for path, leaf in flatten_dict(params, sep="/").items() if isinstance(leaf, QTensor)}


@evidence("H13", oracle="logits of the same model in float32", code="llmjax.quant.quantize")
def test_eight_bits_hardly_change_the_logits(evidence, params):
    """Weights are off by 0.6 percent of their spread at most; so are the logits, about."""
    exact = logits(MODEL, params)
    tree = quantise(MODEL, params, Quantize(format=Integer(bits=8)))
    evidence.record(float(jnp.linalg.norm(logits(MODEL, tree) - exact) / jnp.linalg.norm(exact)), 0.02)
    coarse = quantise(MODEL, params, Quantize(format=Integer(bits=3), targets="mlp/up"))
    assert float(jnp.abs(logits(MODEL, coarse) - exact).max()) > 3 * float(jnp.abs(logits(MODEL, tree) - exact).max())


@evidence(
    "H13",
    oracle="law: the model with quantised tensors is the model with their dense values",
    code="llmjax.quant.tensor",
)
def test_a_quantised_model_is_its_dense_values(evidence, params):
    """Through scan, jit and gradients; the sums run in another order."""
    tree = quantise(MODEL, params, Quantize(targets="query|mlp/up"))
    dense = jax.tree.map(
        lambda x: x.dense() if isinstance(x, QTensor) else x, tree, is_leaf=lambda x: isinstance(x, QTensor)
    )
    evidence.record(float(jnp.abs(logits(MODEL, tree) - logits(MODEL, dense)).max()), 1e-6)

    def through(embedding, params):
        return jnp.sum(jnp.square(logits(MODEL, params | {"embed": {"embedding": embedding}})))

    table = params["embed"]["embedding"]
    got, want = (jax.jit(jax.grad(through))(table, given) for given in (tree, dense))
    evidence.record(float(jnp.abs(got - want).max() / jnp.abs(want).max()), 1e-5)


def test_which_parameters_are_quantised(params):
    """Embeddings, norms and heads are left; expressions choose among the rest."""
    every = stored(quantise(MODEL, params, Quantize()))
    assert every == {f"blocks/0/mixer/{n}/kernel" for n in ("query", "key", "value", "out")} | {
        f"blocks/0/mlp/{n}/kernel" for n in ("gate", "up", "down")
    }
    some = Quantize(
        targets="mixer", exclude="/out$", overrides=(Override("value", Integer(bits=2)), Override("key", None))
    )
    tree = quantise(MODEL, params, some)
    assert stored(tree) == {"blocks/0/mixer/query/kernel", "blocks/0/mixer/value/kernel"}
    assert tree["blocks"]["0"]["mixer"]["value"]["kernel"].format == Integer(bits=2)
    assert "embed/embedding" in stored(quantise(MODEL, params, Quantize(tables=True)))
    rest = quantise(MODEL, params, replace(some, rest="bfloat16"))
    assert rest["norm"]["scale"].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="matches no projection: targets='attn' among blocks/0/mixer/key"):
        quantise(MODEL, params, Quantize(targets="attn"))
    with pytest.raises(InputError, match="GPTQ needs to see the inputs of blocks/0/mixer/key"):
        quantise(MODEL, params, Quantize(method=GPTQ()))


def test_experts_are_quantised_too():
    model = Decoder(vocab=19, d_model=16, layers=1, pattern=(Block(mlp=MoE(experts=4)),))
    params = model.init(jax.random.key(0))
    tree = quantise(model, params, Quantize(format=Integer(bits=8)))
    assert any("experts" in path for path in stored(tree))
    np.testing.assert_allclose(logits(model, tree), logits(model, params), atol=0.05)


@evidence(
    "H12",
    oracle="closed form: 4.127 bits of the projections, 2 bytes of the rest; at most 3.9 GB for 7B",
    code="llmjax.quant.report",
)
def test_memory(evidence):
    """Shapes alone. Llama 2 7B has 6,476,005,376 weights in projections, GPT-2 84,934,656 (122.8 MB with the rest)."""
    config = Quantize(rest="bfloat16")
    model = llama2("7B")
    seven = memory(jax.eval_shape(partial(quantise, model, config=config), model.abstract()))
    assert (seven.quantised_weights, seven.weights) == (6_476_005_376, 6_738_415_616)
    evidence.record(seven.bytes, 3.9e9)
    assert round(seven.quantised_bits, 3) == 4.127
    small = gpt2()
    found = memory(jax.eval_shape(partial(quantise, small, config=config), small.abstract()))
    assert found.quantised_weights == 84_934_656
    assert found.bytes / 1e6 == pytest.approx(122.8, abs=0.05)


@evidence(
    "H12",
    oracle="written out and read back by the config system; refused values name their field",
    code="llmjax.quant.quantize",
)
def test_config(evidence):
    config = Quantize(
        format=NF4(block=128), method=GPTQ(act_order=True), overrides=(Override("mlp", Integer(), AWQ()),)
    )
    validate(config)
    evidence.record(float(from_dict(to_dict(config), Quantize) != config), 0)
    assert override(config, ["--format.block=channel", "--method.chunk=32"]).format.block == "channel"
    for bad, field in (
        (Quantize(targets="("), "targets"),
        (Quantize(activations=1), "activations"),
        (Quantize(overrides=(Override("["),)), "overrides.0.targets"),
        (Quantize(format=Integer(bits=1)), "format.bits"),
    ):
        with pytest.raises(ConfigError, match=field):
            validate(bad)


def test_reports(params):
    config = Quantize(format=Integer(bits=4, block=8), targets="mlp/up")
    tree = quantise(MODEL, params, config)
    found = errors(params, tree)["blocks/0/mlp/up/kernel"]
    w = np.asarray(params["blocks"]["0"]["mlp"]["up"]["kernel"])
    off = np.asarray(tree["blocks"]["0"]["mlp"]["up"]["kernel"].dense()) - w
    want = np.sqrt((off**2).sum((1, 2)) / (w**2).sum((1, 2)))
    np.testing.assert_allclose(found.relative, want, rtol=1e-5)
    np.testing.assert_allclose(found.sqnr_db, -20 * np.log10(want), rtol=1e-5)
    watched = rounding_errors(MODEL, params, config)
    np.testing.assert_allclose(watched["blocks/0/mlp/up"].relative, want, rtol=1e-5)
    sizes = memory(tree)
    assert sizes.quantised_bits == 4 + 32 / 8
    assert sizes.weights == MODEL.num_params()


@pytest.fixture(scope="module")
def seen(params):
    return calibrate(MODEL, params, [{"tokens": TOKENS[:2]}, {"tokens": TOKENS[2:]}])


def test_calibration_sees_the_inputs_of_every_projection(params, seen):
    """Beside the activations themselves, read by the model's own sites."""
    _, sites = MODEL.build().apply({"params": params}, TOKENS, mutable=["sites"])
    z = np.asarray(flatten_dict(sites["sites"], sep="/")["blocks/0/mlp/hidden"])
    found = seen["blocks/0/mlp/down"]
    rows = z.reshape(2, -1, z.shape[-1])
    np.testing.assert_allclose(found.gram, np.einsum("lri,lrj->lij", rows, rows) / rows.shape[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.mean, np.abs(rows).mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.largest, np.abs(rows).max(1), rtol=1e-6)
    assert set(seen) == {path.removesuffix("/kernel") for path in stored(quantise(MODEL, params, Quantize()))}
    with pytest.raises(InputError, match="at least one batch"):
        calibrate(MODEL, params, [])


@evidence(
    "H19", oracle="logits in float32: nearer than rounding to the nearest at 3 bits", code="llmjax.quant.quantize"
)
def test_compensation_pays_in_a_model(evidence, params):
    """Measured on the calibration tokens: 36 tokens of 16 features correlate by chance alone.

    Weights are ten times those of an untrained model, so that layers matter to each other.
    """
    params = jax.tree.map(lambda p: 10 * p, params)
    seen = calibrate(MODEL, params, [{"tokens": TOKENS}])
    exact, config = logits(MODEL, params), Quantize(format=Integer(bits=3, block=8), targets="query|mlp/up")
    trees = [
        quantise(MODEL, params, config),
        quantise(MODEL, params, replace(config, method=GPTQ()), seen),
        layer_by_layer(MODEL, params, replace(config, method=GPTQ()), [{"tokens": TOKENS}]),
    ]
    apart = [float(jnp.linalg.norm(logits(MODEL, tree) - exact)) for tree in trees]
    evidence.record(apart[1] / apart[0], 0.9)
    evidence.record(apart[2] / apart[0], 0.9)
    # The second layer is what it is given the first as it is quantised.
    last, mixed = flatten_dict(trees[2], sep="/"), dict(flatten_dict(params, sep="/"))
    for path in stored(trees[2]):
        mixed[path] = mixed[path].at[0].set(last[path].dense()[0])
    mixed = unflatten_dict(mixed, sep="/")
    again = quantise(MODEL, mixed, replace(config, method=GPTQ()), calibrate(MODEL, mixed, [{"tokens": TOKENS}]))
    for path, tensor in flatten_dict(again, sep="/").items():
        if isinstance(tensor, QTensor):
            np.testing.assert_array_equal(tensor.codes[1], last[path].codes[1])
