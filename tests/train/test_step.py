"""The update against plain optax and jax.grad, written out here."""

import dataclasses
import hashlib
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import MLP
from llmjax.parallel.mesh import MeshConfig, batch_sharding
from llmjax.train.ema import Ema
from llmjax.train.loss_scale import Dynamic
from llmjax.train.optimizers import Sophia
from llmjax.train.precision import Precision
from llmjax.train.prefetch import put
from llmjax.train.state import by_path, params_sha256, plan
from llmjax.train.step import Compiled, Step, apply_of
from llmjax.train.throughput import mfu
from tests.evidence import evidence
from tests.train.tiny import tiny

RATE = 1e-2


def batch_of(experiment, seed=0, ragged=True):
    """A batch of random tokens, its loss masks of very different lengths from row to row."""
    draw = np.random.default_rng(seed)
    shape = experiment.data.batch_size, experiment.data.length
    tokens, targets = draw.integers(0, experiment.model.vocab, (2, *shape)).astype(np.int32)
    mask = np.arange(shape[1]) < draw.integers(0, shape[1] + 1, (shape[0], 1)) if ragged else np.ones(shape)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": mask.astype(np.float32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "target_bytes": np.ones(shape, np.int32),
    }


def build(experiment):
    """The step of an experiment, its plan and mesh."""
    mesh = experiment.mesh.build()
    planned = plan(experiment.model, experiment.optimizer, experiment.train, mesh)
    apply = apply_of(experiment.model.build())
    needs = experiment.optimizer.needs_objective
    return Step(apply, experiment.objective, planned.optimizer, experiment.train, needs), planned, mesh


def run(experiment, batch, steps=1, state=None, learning_rate=RATE):
    """State and metrics after some steps, jitted."""
    step, planned, _ = build(experiment)
    state = planned.init(experiment.seed) if state is None else state
    metrics, jitted = {}, jax.jit(step)
    for index in range(steps):
        state, metrics = jitted(state, batch, learning_rate, index, experiment.seed)
    return state, metrics


def plain_loss(experiment, params, batch):
    """Token-mean cross-entropy by optax on the model's logits."""
    module = experiment.model.build()
    logits, _ = module.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(nll * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])


def plain_gradients(experiment, params, batch):
    """Of `plain_loss`."""
    return jax.jit(jax.grad(lambda p: plain_loss(experiment, p, batch)))(params)


def distance(a, b):
    """Largest absolute difference between two trees of arrays."""
    return max(
        float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.mark.slow
@evidence("E13", oracle="jax.grad and optax.adamw written out", code="llmjax.train.step.Step")
def test_steps_are_those_of_plain_optax(evidence):
    experiment = tiny()
    batch, config = batch_of(experiment), experiment.optimizer
    params = experiment.model.init(jax.random.key(experiment.seed))
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(RATE, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed),
    )
    opt_state = tx.init(params)
    gradient = jax.jit(jax.grad(lambda p: plain_loss(experiment, p, batch)))
    for _ in range(3):
        gradients = gradient(params)
        updates, opt_state = jax.jit(tx.update)(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    state, metrics = run(experiment, batch, steps=3)
    np.testing.assert_allclose(metrics["grad_norm"].total, optax.tree.norm(gradients), rtol=1e-4)
    np.testing.assert_allclose(metrics["update_norm"].total, optax.tree.norm(updates), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"].total, optax.tree.norm(params), rtol=1e-5)
    # Adam divides by sqrt(v): where a gradient is near zero its rounding (1e-7) grows, three steps of 1e-2 long.
    evidence.record(distance(state.params, params), 1e-4)


@evidence("E17", oracle="jax.grad of the whole batch at once", code="llmjax.train.step.Step.accumulated")
@pytest.mark.parametrize("count", [2, 8])
def test_accumulated_gradients_are_those_of_the_big_batch(evidence, count):
    experiment = tiny(accumulate=count)
    batch = batch_of(experiment)
    lengths = batch["loss_mask"].reshape(-1, count, experiment.data.length).sum(axis=(0, 2))
    assert len(set(lengths)) > 1, "microbatches of equal weight would not show the weighting"
    step, planned, _ = build(experiment)
    state = planned.init(0)
    whole = plain_gradients(experiment, state.params, batch)
    gradients, metrics = jax.jit(step.gradients)(state, batch, jax.random.key(0), 0)
    np.testing.assert_allclose(metrics["loss"].count, batch["loss_mask"].sum())
    evidence.record(distance(gradients, whole), 1e-6)


@pytest.mark.slow
def test_a_microbatch_without_targets_changes_nothing():
    experiment = tiny(accumulate=2)
    batch = batch_of(experiment, ragged=False)
    batch["loss_mask"][1::2] = 0
    step, planned, _ = build(experiment)
    state = planned.init(0)
    half = plain_gradients(experiment, state.params, {k: v[::2] for k, v in batch.items()})
    gradients, _ = jax.jit(step.gradients)(state, batch, jax.random.key(0), 0)
    chex.assert_trees_all_close(gradients, half, atol=1e-6)


@pytest.mark.slow
def test_keys_are_functions_of_seed_step_and_microbatch():
    experiment = tiny({"model.dropout": 0.5, "data.batch_size": 4}, accumulate=2)
    row = {name: x[:1] for name, x in batch_of(experiment, ragged=False).items()}
    batch = {name: np.repeat(x, 4, axis=0) for name, x in row.items()}
    step, planned, _ = build(experiment)
    state = planned.init(0)

    jitted = jax.jit(step)

    def loss(index, seed):
        return float(jitted(state, batch, 0.0, index, seed)[1]["loss"].total)

    assert loss(3, 1) == loss(3, 1)
    assert len({loss(3, 1), loss(4, 1), loss(3, 2)}) == 3
    key = jax.random.key(0)
    drawn = jax.jit(lambda m: step.microbatch(state, row, jax.random.fold_in(key, m))[1]["loss"].total)
    alike = [drawn(m) for m in range(2)]
    assert alike[0] != alike[1]


def test_one_trace_for_all_rates_steps_and_seeds():
    experiment = tiny()
    step, planned, mesh = build(experiment)
    batch = batch_of(experiment)
    compiled = Compiled(step, planned, mesh).compile(batch)
    state, placed = planned.init(0), put(batch, batch_sharding(mesh))
    for index, rate in enumerate((0.0, 1e-3, 1.0)):
        state, _ = compiled(state, placed, rate, index, index)
    assert compiled.traces == 1
    assert compiled.seconds > 0


def test_the_compiled_step_is_the_function():
    experiment = tiny()
    step, planned, mesh = build(experiment)
    batch = batch_of(experiment)
    expected = jax.jit(step)(planned.init(0), batch, RATE, 5, 7)
    got = Compiled(step, planned, mesh).compile(batch)(planned.init(0), put(batch, batch_sharding(mesh)), RATE, 5, 7)
    chex.assert_trees_all_equal(got, expected)


@evidence("E60", oracle="a NaN put into the batch", code="llmjax.train.step.Step")
def test_bad_steps_change_nothing_and_end_the_run(evidence):
    experiment = tiny(stop_after_bad=2, ema=Ema())
    good = batch_of(experiment)
    bad = {**good, "loss_mask": np.full_like(good["loss_mask"], np.nan)}
    start, metrics = run(experiment, good)
    assert (int(start.bad), float(metrics["skipped"].total)) == (0, 0.0)
    once, metrics = run(experiment, bad, state=start)
    changed = distance(start._replace(bad=None), once._replace(bad=None))
    assert (int(once.bad), float(metrics["skipped"].total)) == (1, 1.0)
    assert all(float(metrics[name].total) == 0.0 == float(metrics[name].count) for name in ("loss", "nll", "grad_norm"))
    again, _ = run(experiment, good, state=once)
    assert int(again.bad) == 0
    twice, _ = run(experiment, bad, steps=2, state=start)
    # After two in a row the state is kept for the diagnosis, whatever comes next.
    frozen, metrics = run(experiment, good, state=twice)
    assert float(metrics["skipped"].total) == 1.0
    evidence.record(changed + distance(start._replace(bad=None), frozen._replace(bad=None)), 0.0)


@pytest.mark.slow
def test_an_overflowing_loss_scale_backs_off_until_the_step_succeeds():
    precision = Precision("float16", loss_scale=Dynamic(scale=2.0**40))
    experiment = tiny(precision=precision, stop_after_bad=100)
    state, metrics = run(experiment, batch_of(experiment))
    assert float(metrics["skipped"].total) == 1.0
    assert float(state.loss_scale.scale) == 2.0**39
    state, metrics = run(experiment, batch_of(experiment), steps=40, state=state)
    assert int(state.bad) == 0
    assert float(state.loss_scale.scale) < 2.0**39


@pytest.mark.slow
def test_half_precision_gradients_are_near_those_of_float32():
    exact = build(tiny())[1].init(0)
    batch = batch_of(tiny())
    whole = plain_gradients(tiny(), exact.params, batch)
    for precision in (Precision("bfloat16"), Precision("float16", loss_scale=Dynamic(scale=1024.0))):
        step, planned, _ = build(tiny(precision=precision))
        gradients, _ = jax.jit(step.gradients)(planned.init(0), batch, jax.random.key(0), 0)
        assert {str(g.dtype) for g in jax.tree.leaves(gradients)} == {"float32"}
        norm = optax.tree.norm(jax.tree.map(jnp.subtract, gradients, whole)) / optax.tree.norm(whole)
        # An ulp of bfloat16 is 2^-8; a few layers of rounding add up to a few of them.
        assert 0 < float(norm) < 0.05


@pytest.mark.slow
def test_the_average_follows_the_parameters():
    experiment = tiny(ema=Ema(decay=0.5, debias=False))
    batch = batch_of(experiment)
    _, planned, _ = build(experiment)
    start = planned.init(0).params
    one, _ = run(experiment, batch)
    expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, start, one.params)
    chex.assert_trees_all_close(one.ema.average, expected, atol=1e-7)


@pytest.mark.slow
def test_an_optimizer_that_asks_for_the_loss_gets_it():
    experiment = dataclasses.replace(tiny(accumulate=2), optimizer=Sophia(interval=1))
    state, metrics = run(experiment, batch_of(experiment), steps=2)
    assert float(metrics["skipped"].total) == 0.0
    chex.assert_tree_all_finite(state.params)


def test_hash_is_over_bytes_in_path_order():
    tree = {
        "b": np.array([1.0, 2.0], np.float32),
        "a": {"z": np.array([3], np.int32), "c": np.array([[4.0]], np.float32)},
    }
    text = b"".join(x.tobytes() for x in (tree["a"]["c"], tree["a"]["z"], tree["b"]))
    assert params_sha256(tree) == hashlib.sha256(text).hexdigest()


@evidence("E75", oracle="XLA cost_analysis of a compiled dense step", code="llmjax.nn.decoder.Decoder.flops_per_token")
def test_flops_are_those_that_xla_counts(evidence):
    model = Decoder(vocab=512, d_model=256, layers=2, norm=None)
    model = dataclasses.replace(model, pattern=(dataclasses.replace(model.pattern[0], mlp=MLP()),))
    experiment = dataclasses.replace(tiny({"data.length": 16, "data.batch_size": 8}), model=model)
    step, planned, _ = build(experiment)
    batch = batch_of(experiment)
    compiled = jax.jit(step.gradients).lower(planned.init(0), batch, jax.random.key(0), 0).compile()
    ours = experiment.model.flops_per_token(16) * batch["tokens"].size
    # XLA also counts norms, activations and softmax, and the masked half of the (here short) attention.
    evidence.record(abs(compiled.cost_analysis()["flops"] / ours - 1), 0.05)


@evidence("E75", oracle="closed form with the vendor's peak", code="llmjax.train.throughput.mfu")
def test_mfu(evidence):
    class Chip:
        def __init__(self, kind):
            self.device_kind = kind

    # 1000 tokens/s of 6e9 FLOPs are 6e12 FLOP/s.
    assert mfu(1000.0, 6e9, [Chip("cpu")]) is None
    assert mfu(1000.0, 6e9, [Chip("TPU v5 lite")]) == pytest.approx(6e12 / 197e12)
    assert mfu(1000.0, 6e9, [Chip("NVIDIA H200")] * 8) == pytest.approx(6e12 / (8 * 989e12))
    evidence.record(abs(mfu(1000.0, 6e9, [Chip("TPU v5"), Chip("TPU v5")]) - 6e12 / 918e12), 1e-12)


@evidence("E48", oracle="jax.grad on one device", code="llmjax.parallel.mesh.shardings")
@evidence("E49", oracle="jax.grad on one device", code="llmjax.train.step.Step")
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        (MeshConfig(data=2, fsdp=4), 2),
        *(
            pytest.param(mesh, count, marks=pytest.mark.matrix)
            for mesh in (MeshConfig(data=8), MeshConfig(fsdp=8))
            for count in (1, 2)
        ),
    ],
)
def test_eight_devices_are_one(evidence, mesh, accumulate):
    experiment = dataclasses.replace(tiny({"data.batch_size": 16}, accumulate=accumulate), mesh=mesh)
    batch = batch_of(experiment)
    single = experiment.model.init(jax.random.key(experiment.seed))
    expected, gradients = jax.jit(jax.value_and_grad(lambda p: plain_loss(experiment, p, batch)))(single)
    step, planned, devices = build(experiment)
    state, placed = planned.init(experiment.seed), put(batch, batch_sharding(devices))
    # The same draws; erfinv may differ in its last bit between compiled programs.
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(single), rtol=1e-6)
    got, metrics = jax.jit(step.gradients)(state, placed, jax.random.key(0), 0)
    assert math.isclose(float(metrics["loss"].total / metrics["loss"].count), float(expected), rel_tol=1e-6)
    evidence.record(distance(got, gradients), 1e-6)


@pytest.mark.devices(8)
def test_fsdp_splits_parameters_and_moments():
    experiment = dataclasses.replace(tiny({"data.batch_size": 8}, ema=Ema()), mesh=MeshConfig(fsdp=8))
    _, planned, _ = build(experiment)
    leaves = by_path(planned.init(0))
    sizes = by_path(experiment.model.abstract())
    split = {path for path, x in leaves.items() if x.addressable_shards[0].data.size * 8 == x.size}
    name = "blocks/0/mlp/up/kernel"
    assert name in sizes
    assert {path for path in leaves if path.endswith(name)} <= split
    assert sum(path.endswith(name) for path in split) == 4  # the parameter, two moments, the average
