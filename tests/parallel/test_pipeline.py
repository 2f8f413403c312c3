"""Pipelines: the schedules counted slot by slot, and staged stacks against the same stack on one device."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError, InputError, validate
from llmjax.data import Data
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba import Mamba
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.t5_bias import T5Bias
from llmjax.parallel.mesh import MeshConfig
from llmjax.parallel.pipeline import bubble_fraction, pipelined, place, ticks_of
from llmjax.train.step import apply_of
from tests.evidence import evidence
from tests.parallel.test_factorisations import VOCAB, gradients, single, worst

pytestmark = pytest.mark.devices(8)
TOLERANCE = 1e-5
"""Of a tensor's largest magnitude: float32 sums over microbatches in another order."""
SCHEDULES = [(2, 1, 1), (2, 4, 1), (4, 8, 1), (8, 8, 1), (2, 2, 2), (2, 8, 4), (4, 4, 2), (4, 8, 2)]
EVERY = pytest.mark.parametrize(("stages", "parts", "rounds"), SCHEDULES)


def simulated(stages, parts, rounds):
    """Ticks and idle slots where every stage takes, of the work whose input is there, that of the earliest group.

    Groups are of as many microbatches as there are stages; within one the furthest round goes last.
    """
    left = {(m // stages, r, m, s) for m in range(parts) for r in range(rounds) for s in range(stages)}
    work, done, ticks = len(left), set(), 0
    while left:
        ready = []
        for s in range(stages):
            mine = sorted(w for w in left if w[3] == s and all(before in done for before in needs(w, stages)))
            ready += mine[:1]
        done |= set(ready)
        left -= done
        ticks += 1
    return ticks, ticks * stages - work


def needs(work, stages):
    """What has to be done before: the stage before, or the last stage's round before."""
    group, r, m, s = work
    return [(group, r, m, s - 1)] if s else [(group, r - 1, m, stages - 1)] if r else []


@evidence("E51", oracle="simulation of a greedy schedule", code="llmjax.parallel.pipeline")
@EVERY
def test_idle_slots_are_the_bubble(stages, parts, rounds, evidence):
    ticks, idle = simulated(stages, parts, rounds)
    assert ticks == ticks_of(stages, parts, rounds)
    evidence.record(abs(idle / (ticks * stages) - bubble_fraction(stages, parts, rounds)), 1e-15)


@EVERY
def test_what_a_stage_needs_came_in_the_tick_before(stages, parts, rounds):
    """Item i of stage s runs in tick i + s; the ring brings it what its neighbour did in the tick before."""
    when = {}
    for item in range(parts * rounds):
        for s in range(stages):
            round_, part = place(item, stages, rounds)
            when[part // stages, round_, part, s] = item + s
    assert len(when) == stages * parts * rounds
    assert all(when[before] == tick - 1 for work, tick in when.items() for before in needs(work, stages))


def layer(own, x, rows, shared, part):
    """A small layer of which every input counts."""
    weight, bias = own
    y = jnp.tanh(x @ weight + bias + rows["shift"][:, None] * shared)
    return x + y, {"mean": jnp.mean(y) * (1 + 0 * part)}


def arguments(repeats=8, batch=8):
    """Layers, rows of activations, what belongs to rows, and what all share."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 0.4, shape).astype(np.float32)
    return (draw(repeats, 4, 4), draw(repeats, 4)), draw(batch, 4), {"shift": draw(batch)}, draw(4)


def scalar(y, handed):
    """A loss with another cotangent for every value."""
    return jnp.sum(jnp.sin(y + jnp.arange(y.size).reshape(y.shape))) + jnp.sum(jnp.cos(7 * handed["mean"]))


def looped(parts, layers, x, rows, shared):
    """The loss by a Python loop over the layers, for all microbatches beside each other."""

    def whole(x, shift, part):
        means = []
        for weight, bias in zip(*layers, strict=True):
            x, handed = layer((weight, bias), x, {"shift": shift}, shared, part)
            means.append(handed["mean"])
        return x, jnp.stack(means)

    grouped = (a.reshape(-1, parts, *a.shape[1:]) for a in (x, rows["shift"]))
    y, means = jax.vmap(whole, (1, 1, 0), (1, 0))(*grouped, jnp.arange(parts))
    return scalar(y.reshape(x.shape), {"mean": jnp.mean(means, axis=0)})


@functools.cache
def expected(parts):
    """The loss and the gradients of all arguments."""
    run = jax.jit(jax.value_and_grad(functools.partial(looped, parts), range(4)))
    return jax.device_get(run(*arguments()))


def piped(config, remat="none"):
    """The same through the stages of a mesh, and the compiled program."""
    with jax.set_mesh(config.build()), config.in_force():
        run = jax.jit(jax.value_and_grad(lambda *a: scalar(*pipelined(layer, *a, remat)), range(4)))
        compiled = run.lower(*arguments()).compile()
        return jax.device_get(compiled(*arguments())), compiled


@evidence("E51", oracle="loop over the layers", code="llmjax.parallel.pipeline")
@pytest.mark.parametrize(
    ("stages", "parts", "rounds", "remat"),
    [(2, 4, 1, "none"), (8, 8, 1, "none"), (4, 4, 2, "none"), (4, 4, 2, "dots"), (4, 4, 2, "full"), (2, 4, 4, "none")],
)
def test_a_pipeline_is_a_loop(stages, parts, rounds, remat, evidence):
    config = MeshConfig(data=8 // stages, stage=stages, microbatches=parts, rounds=rounds)
    got, compiled = piped(config, remat)
    evidence.record(worst(got, expected(parts)), TOLERANCE)
    assert "collective-permute" in compiled.as_text()


def test_more_microbatches_keep_no_more_layers():
    """The backward pass of a tick looks its layers up again: one copy of 256 KiB for each would show."""
    weights, x = jnp.ones((8, 256, 256)), jnp.ones((8, 256))

    def temporary(parts, rounds):
        config = MeshConfig(stage=2, microbatches=parts, rounds=rounds)
        one = lambda w, x, rows, shared, part: (jnp.tanh(x @ w), {})
        with jax.set_mesh(config.build()), config.in_force():
            run = jax.jit(jax.grad(lambda w, x: jnp.sum(pipelined(one, w, x, {}, {})[0]), (0, 1)))
            return run.lower(weights, x).compile().memory_analysis().temp_size_in_bytes

    for rounds in (1, 2):
        assert temporary(8, rounds) - temporary(2, rounds) < 4 * 256**2


PAIR = (Block(Attention(heads=4, head_dim=2, rope=None), None), Block(Mamba(), GLU(d_ff=8)))
MIXED = Decoder(vocab=VOCAB, d_model=8, layers=8, pattern=PAIR, distance=T5Bias(), unroll=1)


@evidence("E51", oracle="one device", code="llmjax.nn.stack")
@pytest.mark.matrix
@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(stage=2, microbatches=4, rounds=2, data=2, tensor=2),
        MeshConfig(stage=4, microbatches=8),
        MeshConfig(stage=2, microbatches=2, fsdp=2, context=2),
    ],
    ids=["circular", "gpipe", "fsdp-context"],
)
def test_a_staged_decoder_equals_one_device(config, evidence):
    """Packed rows, whose documents differ from microbatch to microbatch, two kinds of layer, one table for all."""
    evidence.record(worst(gradients(MIXED, config), single(MIXED)), TOLERANCE)


SMALL = Decoder(
    vocab=VOCAB, d_model=8, layers=4, pattern=(Block(Attention(heads=2, implementation="reference"), dropout=0.5),)
)
TOKENS = jnp.tile(jnp.arange(8), (8, 1))


def states(model, config, key=None, tokens=TOKENS, **named):
    """Features of a model whose every row is the same, on a mesh."""
    params, apply = model.init(jax.random.key(0)), apply_of(model.build())
    with jax.set_mesh(config.build()), config.in_force():
        return jax.device_get(jax.jit(lambda p, t: apply(p, t, key=key, method="features", **named))(params, tokens))


@pytest.mark.matrix
def test_dropout_depends_on_layer_and_microbatch_alone():
    """Every schedule draws the same; rows that are equal, in two microbatches or beside each other, draw apart."""
    key, four = jax.random.key(3), dict(microbatches=4)
    first = states(SMALL, MeshConfig(stage=2, **four), key).hidden
    for config in (MeshConfig(stage=4, **four), MeshConfig(stage=2, rounds=2, **four)):
        np.testing.assert_allclose(states(SMALL, config, key).hidden, first, atol=1e-5)
    assert len(np.unique(first[:, 0, 0])) == 8
    assert not np.allclose(states(SMALL, MeshConfig(stage=2, **four), jax.random.key(4)).hidden, first)


@pytest.mark.matrix
def test_losses_of_layers_are_the_means_over_microbatches():
    """As in accumulation: the balance of experts is that of each microbatch (float32 sums, 1e-6)."""
    block = replace(SMALL.pattern[0], mlp=MoE(4, GLU(d_ff=8), balance_loss=1.0, z_loss=1.0), dropout=0.0)
    model, tokens = replace(SMALL, pattern=(block,)), jax.random.randint(jax.random.key(1), (8, 8), 0, VOCAB)
    got = states(model, MeshConfig(stage=2, microbatches=2), tokens=tokens)
    parts = [states(model, MeshConfig(), tokens=tokens[m::2]) for m in range(2)]
    assert got.losses.keys() == {"balance_loss", "router_z_loss"}
    for kind in ("losses", "metrics"):
        for name, value in getattr(got, kind).items():
            assert value == pytest.approx(np.mean([getattr(part, kind)[name] for part in parts]), rel=1e-6), name


def test_decoding_and_sites_need_no_microbatches():
    """Ten rows in stages whose schedule has four microbatches: what keeps states or is looked into is no pipeline."""
    model, tokens = replace(SMALL, layers=2), jax.random.randint(jax.random.key(1), (10, 4), 0, VOCAB)
    module, params = model.build(), model.init(jax.random.key(0))

    def run(p, t):
        logits, state = module.apply({"params": p}, t, state=model.init_state(10, 4, jnp.float32))
        return logits, state, module.apply({"params": p}, t, mutable=["sites"])

    one, config = jax.jit(run)(params, tokens), MeshConfig(stage=2, microbatches=4)
    with jax.set_mesh(config.build()), config.in_force():
        two = jax.jit(run)(params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two)


def test_what_does_not_come_out_even_is_named():
    with pytest.raises(ConfigError, match="microbatches=3 must be a multiple of stage=2"):
        validate(MeshConfig(stage=2, microbatches=3, rounds=2))
    with pytest.raises(ConfigError, match="rounds=0 must be at least 1"):
        validate(MeshConfig(rounds=0))
    with pytest.raises(InputError, match="mesh.stage=8 x rounds=1 does not divide the 4 repeats of the pattern"):
        states(SMALL, MeshConfig(stage=8))
    with pytest.raises(InputError, match="mesh.microbatches=3 does not divide a batch of 8 rows"):
        states(SMALL, MeshConfig(stage=2, microbatches=3))
    mesh = MeshConfig(stage=3, microbatches=5)
    with pytest.raises(ConfigError, match=r"mesh.stage=3 does not divide the 4 repeats of the pattern: use 1, 2 or 4"):
        validate(Experiment(model=replace(SMALL, vocab=1024), data=Data(batch_size=15), mesh=mesh))
    with pytest.raises(ConfigError, match=r"data.batch_size=8 does not split over .* x mesh.microbatches: use a mult"):
        validate(Experiment(mesh=mesh))
