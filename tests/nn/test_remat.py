"""Rematerialisation: what each policy keeps, how often attention's forward pass runs, and the same gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llmjax.data import Data
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba import Mamba
from llmjax.nn.mlp import GLU
from llmjax.parallel.pipeline import POLICIES
from llmjax.plan.one_device import memory
from pallas_kernels.attention import xla
from pallas_kernels.ring_attention import ring_attention
from tests.evidence import evidence

BATCH, LENGTH, D_MODEL, HEADS, D_FF, LAYERS = 2, 24, 16, 2, 40, 3
MODEL = Decoder(vocab=29, d_model=D_MODEL, layers=LAYERS, unroll=1, pattern=(Block(Attention(HEADS), GLU(D_FF)),))
DATA = Data(batch_size=BATCH, length=LENGTH)
TOKENS = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Short sequences take the form of long ones too, whose forward pass can be told by its name."""
    monkeypatch.setattr(xla, "SHORT", 0)
    monkeypatch.setattr(xla, "tiled_forward", jax.jit(xla.tiled_forward, static_argnums=(2, 3)))


def loss(model, params, tokens):
    return jnp.sum(jnp.sin(model.build().apply({"params": params}, tokens)[0]))


def times(jaxpr, name):
    """How often primitives or jitted functions of that name stand in a jaxpr and all that it holds."""
    total = 0
    for equation in jaxpr.eqns:
        total += name in (equation.primitive.name, equation.params.get("name"))
        total += sum(times(inner, name) for inner in jaxprs_in_params(equation.params))
    return total


def remat(policy, model=MODEL):
    return dataclasses.replace(model, remat=policy)


@evidence("E46", oracle="calls in the gradient's jaxpr", code="llmjax.parallel.pipeline")
@pytest.mark.parametrize(("policy", "expected"), [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
def test_attention_runs_forward_once_where_its_results_are_kept(policy, expected, evidence):
    """In the loops over layers: what flax traces beside them to learn of shapes is never run."""
    gradient = jax.make_jaxpr(lambda p, t: jax.grad(lambda p: loss(remat(policy), p, t))(p))
    equations = gradient(MODEL.abstract(), TOKENS).jaxpr.eqns
    loops = [equation.params["jaxpr"].jaxpr for equation in equations if equation.primitive.name == "scan"]
    evidence.record(abs(sum(times(loop, "tiled_forward") for loop in loops) - expected), 0)


@pytest.mark.matrix
@evidence("E46", oracle="calls in the gradient's jaxpr", code="pallas_kernels.ring_attention.ring")
@pytest.mark.devices(2)
def test_a_ring_goes_round_forward_once_where_its_results_are_kept(evidence):
    """Of F messages forward and B backward, F + B are sent, and F more where the forward pass runs again."""
    mesh = jax.make_mesh((2,), ("ring",), axis_types=(AxisType.Auto,))
    rows, x = P(None, "ring"), jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)

    def mixed(q, k, v):
        run = lambda *arrays: ring_attention(*arrays, axis_name="ring", is_causal=True)
        return jnp.sum(jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)(jnp.sin(q), k, v))

    def messages(function):
        return times(jax.make_jaxpr(function)(x, x, x).jaxpr, "ppermute")

    sent = {name: messages(jax.grad(jax.checkpoint(mixed, policy=rule))) for name, rule in POLICIES.items()}
    forward, plain = messages(mixed), messages(jax.grad(mixed))
    assert 0 < forward < plain
    assert sent["dots"] == sent["attention"]
    evidence.record(abs(sent["attention"] - plain) + abs(sent["full"] - plain - forward), 0)


@evidence("E46", oracle="shapes of what is kept", code="llmjax.nn.stack")
def test_kept_bytes_are_those_of_what_is_named(evidence):
    """Beside block inputs: attention's output and log-sum-exp; then at least the products."""
    kept = bytes_of(MODEL)
    results = 4 * LAYERS * BATCH * LENGTH * (D_MODEL + HEADS)
    products = 4 * LAYERS * BATCH * LENGTH * (4 * D_MODEL + 2 * D_FF)
    assert kept["attention"] + products <= kept["dots"] < kept["none"]
    evidence.record(abs(kept["attention"] - kept["full"] - results), 0)


@pytest.mark.matrix
@evidence("E46", oracle="bytes of the same blocks, each a repeat of its own", code="llmjax.nn.stack")
def test_what_is_kept_does_not_depend_on_how_blocks_are_repeated(evidence):
    """Four blocks in one or four repeats keep four inputs; loops add a number or two to them (1 percent)."""
    for name in ("dots", "full"):
        models = [dataclasses.replace(MODEL, layers=4, pattern=MODEL.pattern * count) for count in (1, 4)]
        kept = [bytes_of(model, name)[name] for model in models]
        evidence.record(abs(kept[1] / kept[0] - 1), 0.01)


def test_without_attention_kernels_there_is_nothing_more_to_keep():
    kept = bytes_of(dataclasses.replace(MODEL, pattern=(Block(Mamba(), GLU(D_FF)),)))
    assert kept["full"] == kept["attention"] < kept["dots"]


def bytes_of(model, *names):
    """What the forward pass hands to the backward pass under these policies, or under every one."""
    experiments = {name: Experiment(model=remat(name, model), data=DATA) for name in names or POLICIES}
    return {name: memory(experiment)["activations"] for name, experiment in experiments.items()}


@evidence("E46", oracle="the gradient without rematerialisation", code="llmjax.nn.stack")
def test_gradients_are_those_of_a_pass_that_keeps_everything(evidence):
    """Float32 of other fusions: 1e-5 of a tensor's largest number."""
    draw, tokens = np.random.default_rng(0), jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 29
    params = jax.tree.map(lambda x: draw.normal(0.5, 0.2, x.shape).astype(np.float32), MODEL.abstract())

    def gradient(policy):
        return jax.device_get(jax.jit(jax.grad(lambda p: loss(remat(policy), p, tokens)))(params))

    expected = gradient("none")
    for policy in ("dots", "attention"):
        errors = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / np.max(np.abs(b)), gradient(policy), expected)
        evidence.record(max(jax.tree.leaves(errors)), 1e-5)
