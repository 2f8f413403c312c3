"""Gated LoRA, its penalties and its training; the budget of AdaLoRA; LoRA+: against closed forms and planted ranks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.adapters import Adapted, LoRA
from llmjax.adapters.adalora import AdaLoRA
from llmjax.adapters.gate_report import gate_map, gate_sum, importance, next_strength
from llmjax.adapters.gated import GatedLoRA, opened, penalty, pruned
from llmjax.config import ConfigError
from llmjax.nn.model import flat, split, unflat
from llmjax.nn.projections import Projection
from llmjax.train.optimizers.adam import AdamW
from llmjax.train.optimizers.base import set_learning_rate
from llmjax.train.optimizers.gated_adamw import GatedAdamW
from llmjax.train.optimizers.lora_plus import lora_plus
from llmjax.train.optimizers.rank_budget import RankBudgetAdamW
from tests.adapters.cases import MODELS, logits_of
from tests.evidence import evidence
from tests.models.golden import random_params

pytestmark = pytest.mark.adapters

RANDOM = np.random.default_rng(0)
P = Projection((12,), (2, 4), ("d_model", "heads", "head_dim"))
GATES = ("projected", "sigmoid", "clamped", "hard_sigmoid")


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(mine) - np.asarray(theirs)).max() / np.abs(theirs).max())


def drawn(adapter):
    """An adapter's parameters for one matrix, B random."""
    boxes = adapter.start(jax.random.key(0), P, jnp.zeros((12, 2, 4)))
    return {k: b.value for k, b in boxes.items()} | {
        "b": jnp.asarray(RANDOM.normal(size=(adapter.rank, 2, 4)), jnp.float32)
    }


@evidence("G13", oracle="LoRA where gates are 1; diag(A^T G B) alpha / r by numpy", code="llmjax.adapters.gated")
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_on_each_direction(gate, evidence):
    """Gates of 1: LoRA; of 0: the base; and the gradient of a gate, 1e-5, float32 sums of 96."""
    adapter = GatedLoRA(rank=3, gate=gate, opening=0.5)
    params, kernel = drawn(adapter), jnp.asarray(RANDOM.normal(size=(12, 2, 4)), jnp.float32)
    evidence.record(relative(opened(gate, params["gate"]), 0.5 * np.ones(3)), 1e-6)
    if gate != "sigmoid":
        ends = {"projected": (0.0, 1.0), "clamped": (0.0, 1.0), "hard_sigmoid": (-2.5, 2.5)}[gate]
        shut, wide = (adapter.weight({**params, "gate": jnp.full(3, x)}, kernel, P, None) for x in ends)
        evidence.record(relative(shut, kernel), 0)
        evidence.record(relative(wide, LoRA(rank=3).weight(params, kernel, P, None)), 1e-6)
    g = RANDOM.normal(size=(12, 8))
    loss = lambda held: jnp.sum(adapter.weight({**params, "gate": held}, kernel, P, None).reshape(12, 8) * g)
    slope = {"projected": 1.0, "clamped": 1.0, "sigmoid": 0.25, "hard_sigmoid": 0.2}[gate]
    a, b = np.asarray(params["a"], np.float64), np.asarray(params["b"], np.float64).reshape(3, 8)
    evidence.record(relative(jax.grad(loss)(params["gate"]), slope * adapter.scale * np.diag(a.T @ g @ b.T)), 1e-5)


@evidence("G14", oracle="derivatives in closed form", code="llmjax.adapters.gated")
def test_how_gates_are_held(evidence):
    """d sigmoid = g (1 - g), d hard sigmoid = 0.2; a clamped gate below 0 has no gradient and stays closed for ever."""
    at = jnp.array([-1.0, 0.3, 2.0])
    slopes = {gate: jax.vmap(jax.grad(lambda z, gate=gate: opened(gate, z)))(at) for gate in GATES}
    g = 1 / (1 + np.exp(-np.asarray(at, np.float64)))
    wanted = {"sigmoid": g * (1 - g), "hard_sigmoid": [0.2, 0.2, 0.2], "clamped": [0, 1, 0], "projected": [1, 1, 1]}
    for gate, theirs in wanted.items():
        evidence.record(float(np.abs(np.asarray(slopes[gate]) - np.asarray(theirs)).max()), 1e-6)
    assert float(jax.grad(lambda z: opened("hard_sigmoid", z))(-3.0)) == 0.0
    descend = lambda gate, g: minimised(gate, "l1", 0.0, g, target=1.0)
    assert descend("clamped", -0.1) == 0.0
    assert abs(descend("projected", 0.0) - 1) < 1e-3


def minimised(gate, kind, strength, start, target, steps=600):
    """The gate that gradient descent on 1/2 (g - target)^2 + strength penalty(g) ends at, through the optimizer."""
    config = GatedAdamW(gate=gate, penalty=kind, strength=strength, factors=0.0, warmup=1, clip=None, weight_decay=0.0)
    params = {
        "x": {"adapters": {"default": {"gate": jnp.full(1, start), "a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}}}
    }
    optimizer = config.build(params)

    def step(carry, _):
        params, state = carry
        slope = jax.grad(lambda p: 0.5 * jnp.sum((opened(gate, p["x"]["adapters"]["default"]["gate"]) - target) ** 2))
        updates, state = optimizer.update(slope(params), set_learning_rate(state, 1e-3), params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))((params, optimizer.init(params)))
    return float(opened(gate, params["x"]["adapters"]["default"]["gate"])[0])


@evidence("G15", oracle="clip(c - l, 0, 1), and the signs of derivatives", code="llmjax.adapters.gated")
def test_penalties(evidence):
    """One gate under |g|: 0.7, 0, 1 as on paper, 2e-3 (Adam's last steps of 1e-2); entropy draws to the nearer end."""
    for target, wanted in ((0.8, 0.7), (0.05, 0.0), (1.5, 1.0)):
        found = minimised("projected", "l1", 0.1, 0.5, target)
        evidence.record(abs(found - wanted), 2e-3)
        slope = found - target + 0.1
        assert abs(slope) < 2e-3 or (found == 0 and slope > 0) or (found == 1 and slope < 0)
    slope = lambda kind, g: float(jax.grad(lambda g: penalty(kind, g))(g))
    evidence.record(abs(slope("entropy", 0.3) - math.log(0.7 / 0.3)), 1e-5)
    assert slope("entropy", 0.7) < 0 < slope("entropy", 0.3)
    evidence.record(abs(slope("l0", 0.5) - 2.5), 1e-5)
    evidence.record(abs(float(penalty("l0", jnp.array([0.0, 1.0, 1.0]))) - 2), 0.01)


def planted(strength, factors, seed=0):
    """Gates, and singular values of the change, after 4000 steps on y = x D + noise, D of rank 4, from rank 16."""
    random = np.random.default_rng(seed)
    d = random.normal(size=(64, 4)) @ random.normal(size=(4, 64)) / 8
    x = random.normal(size=(512, 64))
    y = jnp.asarray(x @ d + 0.1 * random.normal(size=(512, 64)), jnp.float32)
    x, adapter = jnp.asarray(x, jnp.float32), GatedLoRA(rank=16, alpha=16.0)
    projection = Projection((64,), (64,), (None, None))
    own = {k: b.value for k, b in adapter.start(jax.random.key(seed), projection, jnp.zeros((64, 64))).items()}
    params = {"x": {"adapters": {"default": own}}}
    config = GatedAdamW(strength=strength, factors=factors, weight_decay=0.0, clip=None, b2=0.999)
    optimizer = config.build(params)
    change = lambda p: adapter.weight(p["x"]["adapters"]["default"], jnp.zeros((64, 64)), projection, None)

    def step(carry, _):
        params, state = carry
        slopes = jax.grad(lambda p: jnp.mean((x @ change(p) - y) ** 2))(params)
        updates, state = optimizer.update(slopes, set_learning_rate(state, 1e-3), params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 4000))((params, optimizer.init(params)))
    return np.asarray(params["x"]["adapters"]["default"]["gate"]), np.linalg.svd(change(params), compute_uv=False)


@evidence("G16", oracle="the rank that was planted, 4 of 16", code="llmjax.train.optimizers.gated_adamw")
def test_the_recipe_recovers_a_planted_rank(evidence):
    """The change has rank 4 whatever the penalty is; that four gates stay open depends on it.

    Of (l, m) = (1e-2, 0), (1e-2, 1e-4), (1e-2, 1e-3), (1e-3, 1e-3), (3e-2, 1e-3) on seeds 0 to 3 only the last left
    four open on every seed, the others 5 to 8, 4 to 6, 4 to 6 and all 16. On seeds 10 to 17, which had no part in the
    choice, it did in 8 of 8, and (1e-2, 1e-3) in 3 of 8.
    """
    gates, values = planted(3e-2, 1e-3, 10)
    evidence.record(abs(int(np.sum(gates > 0.01)) - 4), 0)
    evidence.record(abs(int(np.sum(values > 0.05 * values[0])) - 4), 0)
    gates, values = planted(1e-3, 1e-3, 10)
    assert (np.sum(gates > 0.01), np.sum(values > 0.05 * values[0])) == (16, 4)


@evidence(
    "G16",
    oracle="the rerun of the published settings in the notes: sum of gates 7.998, error 1.3326 to 1.3311",
    code="llmjax.train.optimizers.gated_adamw",
)
def test_the_published_rates_close_nothing(evidence):
    """Adam moves a number by its rate at most: 100 steps of 2e-5 leave 8 half-open gates where they were.

    768 features, 8 x 128 tokens, rank 16, l 1e-4, torch's Adam. The notes say neither alpha nor the warm-up: alpha 32
    (their example) without one makes the error fall as theirs does and gives 7.9978; alpha 16 half that fall and 7.994,
    a warm-up over the 100 steps 8.011. The error is a mean of 786,432 squares and deviates by 0.002.
    """
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(1024, 768)), jnp.float32)
    kernel = random.uniform(-1, 1, size=(768, 768)) / math.sqrt(768)
    rest = jnp.asarray(random.normal(size=(1024, 768)), jnp.float32) - x @ jnp.asarray(kernel, jnp.float32)
    adapter, projection = GatedLoRA(rank=16, alpha=32.0, gate="sigmoid"), Projection((768,), (768,), (None, None))
    own = {k: b.value for k, b in adapter.start(jax.random.key(0), projection, jnp.zeros((768, 768))).items()}
    params = {"x": {"adapters": {"default": own}}}
    adam = {"b2": 0.999, "weight_decay": 0.0}
    config = GatedAdamW(gate="sigmoid", strength=1e-4, warmup=1, factors=0.0, gate_rate=1.0, **adam)
    optimizer = config.build(params)

    def loss(params):
        p = params["x"]["adapters"]["default"]
        low = (x @ p["a"]) * opened("sigmoid", p["gate"])
        return jnp.mean((adapter.scale * low @ p["b"] - rest) ** 2)

    def step(carry, _):
        params, state = carry
        error, slopes = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slopes, set_learning_rate(state, 2e-5), params)
        return (optax.apply_updates(params, updates), state), error

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 100))
    (params, _), errors = run((params, optimizer.init(params)))
    total = float(gate_sum(opened("sigmoid", params["x"]["adapters"]["default"]["gate"])))
    evidence.record(abs(total - 7.998), 1e-3)
    evidence.record(abs(float(errors[0]) - 1.3326), 0.006)
    evidence.record(abs(float(errors[0] - errors[-1]) - (1.3326 - 1.3311)), 1e-4)


def test_warm_up_decay_and_rates_of_the_recipe():
    """l(t) = l min(1, t / T); gates have their own rate and no decay, what else trains keeps the optimizer's."""
    params = {"x": {"adapters": {"default": {"gate": jnp.ones(2), "a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}}}}
    config = GatedAdamW(strength=0.5, warmup=4, factors=0.0, gate_rate=5.0, weight_decay=0.25)
    settings = config.settings(params)
    assert settings["x/adapters/default/gate"] == (5.0, 0.0, False)
    assert settings["x/adapters/default/a"] == (1.0, 0.25, False)
    with pytest.raises(ConfigError, match="GatedAdamW closes the gates of GatedLoRA, and the model has none"):
        config.build({"x": {"kernel": jnp.ones((2, 2))}})
    optimizer = config.build(params)
    state, none = set_learning_rate(optimizer.init(params), 1e-3), jax.tree.map(jnp.zeros_like, params)
    assert float(optimizer.update(none, state, params)[0]["x"]["adapters"]["default"]["gate"][0]) == 0.0
    _, state = optimizer.update(none, state, params)
    after, _ = optimizer.update(none, set_learning_rate(state, 1e-3), params)
    assert float(after["x"]["adapters"]["default"]["gate"][0]) < 0.0


@evidence("G17", oracle="logits before, and FLOPs that XLA counts", code="llmjax.adapters.gated")
def test_pruning(evidence):
    """Without closed directions the logits are the same (1e-6: shorter sums) and XLA counts less to do."""
    model = Adapted(base=MODELS["attention"], adapters=(GatedLoRA(rank=4, targets="(mlp/.*|query)$"),))
    leaves = flat(random_params(model))
    closed = {
        path: jnp.abs(x).at[..., 1].set(0).at[0, 3].set(0) for path, x in leaves.items() if path.endswith("t/gate")
    }
    params = unflat(leaves | closed)
    smaller, kept = pruned(model.adapters[0], params, threshold=0.0)
    assert (smaller.rank, smaller.scale) == (3, model.adapters[0].scale)
    less = dataclasses.replace(model, adapters=(smaller,))
    assert flat(less.abstract()).keys() == flat(kept).keys()
    evidence.record(relative(logits_of(less)(kept), logits_of(model)(params)), 1e-6)
    flops = [logits_of(m).lower(p).compile().cost_analysis()["flops"] for m, p in ((less, kept), (model, params))]
    evidence.record(float(flops[0] >= flops[1]), 0)


@evidence("G18", oracle="a table of the rules; shapes; norms by numpy", code="llmjax.adapters.gate_report")
def test_what_gates_say(evidence):
    """The rules case by case, maps of layers by rank, and importances |g| |a| |b|."""
    table = [([0.0, 0.005], 2e-3, 1e-4), ([0.0, 0.0], 1e-4, 1e-5), ([0.9, 0.95], 1e-4, 5e-4), ([0.0, 1.0], 1e-4, 1e-4)]
    for gates, now, wanted in table:
        evidence.record(abs(next_strength({"x": jnp.array(gates)}, now)[0] / wanted - 1), 1e-6)
    model = Adapted(base=MODELS["mamba and experts"], adapters=(GatedLoRA(rank=3, gate="sigmoid"),))
    params = random_params(model)
    maps, sizes = gate_map(model.adapters[0], params), importance(model.adapters[0], params)
    assert maps["blocks/0/mixer/out"].shape == (2, 3)
    assert maps["blocks/0/mlp/experts/up"].shape == (2, 3, 3)
    for path in ("blocks/0/mixer/out", "blocks/0/mlp/experts/up"):
        a, b = (flat(params)[f"{path}/adapters/default/{leaf}"] for leaf in "ab")
        wanted = np.asarray(maps[path]) * np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1)
        evidence.record(relative(sizes[path], wanted), 1e-5)
    evidence.record(abs(float(gate_sum(jnp.array([1.0, 0.5, 0.25]))) - 1.75), 1e-6)


@evidence(
    "G10", oracle="the ratio of the updates of B and A under one gradient", code="llmjax.train.optimizers.lora_plus"
)
def test_lora_plus(evidence):
    """B moves 16 times as far as A under the same gradient; nothing else is touched: 1e-6."""
    model = Adapted(base=MODELS["attention"], adapters=(LoRA(rank=2),), trained="norm/scale$")
    params = split(random_params(model), model.trains)[0]
    optimizer = AdamW(groups=(lora_plus(),), weight_decay=0.0).build(params)
    state = set_learning_rate(optimizer.init(params), 1e-3)
    updates = flat(jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state, params)[0])
    assert {path.rpartition("/")[2] for path in updates} == {"a", "b", "scale"}
    for path, x in updates.items():
        evidence.record(relative(x, (-16e-3 if path.endswith("/b") else -1e-3) * np.ones(x.shape)), 1e-6)


@evidence(
    "G12",
    oracle="the count of values that are not zero; the cubic schedule by hand",
    code="llmjax.train.optimizers.rank_budget",
)
def test_exactly_the_budget_is_left(evidence):
    """At each cut exactly b(t) values of the whole model are not zero; b falls from all to 2 a matrix as a cube."""
    model = Adapted(base=MODELS["mamba and experts"], adapters=(AdaLoRA(rank=4, targets="/(out|up|down)$"),))
    params = split(random_params(model), model.trains)[0]
    matrices = 2 * (1 + 1 + 3 + 3)
    config = RankBudgetAdamW(rank=2.0, start=4, until=12, every=2)
    optimizer = config.build(params)
    random = np.random.default_rng(0)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, set_learning_rate(state, 1e-2), params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for t in range(1, 17):
        gradients = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)
        params, state = step(params, state, gradients)
        left = sum(int(jnp.sum(x != 0)) for path, x in flat(params).items() if path.endswith("/singular"))
        full, target = 4 * matrices, 2 * matrices
        cube = math.floor((full - target) * (1 - (t - 4) / 8) ** 3 + target)
        if t <= 4 or t > 12 or t % 2 == 0:
            evidence.record(abs(left - (full if t <= 4 else target if t > 12 else cube)), 0)
        if t == 13:
            kept = {path: x != 0 for path, x in flat(params).items() if path.endswith("/singular")}
    for path, x in flat(params).items():
        if path.endswith("/singular"):
            evidence.record(float(np.sum((np.asarray(x) != 0) != np.asarray(kept[path]))), 0)
    with pytest.raises(
        ConfigError, match="RankBudgetAdamW cuts the singular values of AdaLoRA, and the model has none"
    ):
        config.build({"x": {"kernel": jnp.ones((2, 2))}})
