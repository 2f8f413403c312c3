import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.config import ConfigError, from_dict, subclasses, to_dict, validate
from llmjax.train.optimizers import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Group,
    Lion,
    Muon,
    Optimizer,
    RMSprop,
    ScheduleFree,
    Sophia,
    set_learning_rate,
)
from llmjax.train.optimizers.paths import matrix_axes
from tests.evidence import evidence

LAYERS, D_MODEL, HEADS, HEAD_DIM, D_FF, VOCAB = 3, 16, 4, 4, 48, 32
RATE = 0.02
PLAIN = {"no_decay": "", "clip": None}


def normal(shapes, seed=0):
    """A tree of normal draws with the given tree of shapes."""
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    rng = np.random.default_rng(seed)
    return tree.unflatten(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in leaves)


def small(seed=0):
    return normal({"matrix": (6, 5), "vector": (4,), "bias": (3,)}, seed)


def model(seed=0):
    heads = {"kernel": (LAYERS, D_MODEL, HEADS, HEAD_DIM), "bias": (LAYERS, HEADS, HEAD_DIM)}
    block = {
        "norm1": {"scale": (LAYERS, D_MODEL)},
        "mixer": {
            "query": heads,
            "key": heads,
            "value": heads,
            "out": {"kernel": (LAYERS, HEADS, HEAD_DIM, D_MODEL)},
        },
        "mlp": {"up": {"kernel": (LAYERS, D_MODEL, D_FF)}, "down": {"kernel": (LAYERS, D_FF, D_MODEL)}},
    }
    tree = {
        "embed": {"embedding": (VOCAB, D_MODEL)},
        "blocks": {"0": block},
        "final_norm": {"scale": (D_MODEL,)},
        "head": {"kernel": (D_MODEL, VOCAB)},
    }
    return normal(tree, seed)


def run(tx, params, gradients, rate=None, **extra):
    """Parameters and state after one update for each tree of gradients."""
    update, state = jax.jit(functools.partial(tx.update, **extra)), tx.init(params)
    for gradient in gradients:
        state = state if rate is None else set_learning_rate(state, rate)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


def disagreement(config, oracle, params, steps=10, **extra):
    """Largest difference between the parameters after `steps` updates by our config and by an optax optimizer."""
    gradients = [jax.tree.map(lambda p: 0.1 * p, normal(jax.tree.map(jnp.shape, params), 1 + i)) for i in range(steps)]
    ours, _ = run(config.build(params), params, gradients, RATE, **extra)
    theirs, _ = run(oracle, params, gradients, **extra)
    assert difference(ours, params) > 1e-3
    return difference(ours, theirs)


# Ten float32 updates of parameters of size 1, in another order of operations: a few ulps (6e-8) each.
ULPS = 1e-6


@evidence("E18", oracle="optax.adamw", code="llmjax.train.optimizers.adam.AdamW")
def test_adamw_is_optax(evidence):
    config = AdamW(**PLAIN, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-6)
    evidence.record(disagreement(config, optax.adamw(RATE, 0.8, 0.9, 1e-6, weight_decay=0.3), small()), ULPS)


@evidence("E18", oracle="optax.adam after optax.add_decayed_weights", code="llmjax.train.optimizers.adam.Adam")
def test_adam_with_l2_is_optax(evidence):
    oracle = optax.chain(optax.add_decayed_weights(0.3), optax.adam(RATE, 0.8, 0.9, 1e-6))
    evidence.record(disagreement(Adam(**PLAIN, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-6), oracle, small()), ULPS)


@evidence("E18", oracle="hand-written NumPy steps in float64", code="llmjax.train.optimizers.adam")
@pytest.mark.parametrize("coupled", [False, True])
def test_adam_by_hand(evidence, coupled):
    params, rng = small(), np.random.default_rng(5)
    gradients = [jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params) for _ in range(10)]
    b1, b2, eps, decay = 0.9, 0.95, 1e-8, 0.1
    config = (Adam if coupled else AdamW)(weight_decay=decay, b1=b1, b2=b2, eps=eps, clip=None)
    ours, _ = run(config.build(params), params, gradients, RATE)
    for name, start in params.items():
        theta, m, v = np.asarray(start, np.float64), 0.0, 0.0
        wd = 0.0 if name == "bias" else decay
        for t, gradient in enumerate(gradients, start=1):
            g = gradient[name] + wd * theta * coupled
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            theta = theta - RATE * (step + wd * theta * (not coupled))
        # Adam divides by small roots, which magnifies float32 rounding on the way: 1e-6 is five digits of a step.
        evidence.record(np.abs(ours[name] - theta).max(), 2e-6)


@evidence("E18", oracle="closed form of the first step", code="llmjax.train.optimizers.adam.AdamW")
def test_first_adamw_step(evidence):
    params = {"theta": jnp.array([1.0, -2.0])}
    after, _ = run(AdamW(**PLAIN, weight_decay=0.5).build(params), params, [{"theta": jnp.array([0.3, 0.1])}], 0.1)
    # -lr (g / (|g| + eps) + wd * theta), parameters of size 2 in float32
    evidence.record(np.abs(after["theta"] - params["theta"] - np.array([-0.15, 0.0])).max(), 5e-7)


def test_coupled_decay_is_decoupled_under_sgd_but_not_under_adam():
    params, gradients = small(), [small(3)]
    after, _ = run(SGD(**PLAIN, momentum=0, weight_decay=0.3).build(params), params, gradients, RATE)
    expected = jax.tree.map(lambda p, g: p - RATE * (g + 0.3 * p), params, gradients[0])
    chex.assert_trees_all_close(after, expected, atol=ULPS)
    coupled, _ = run(Adam(**PLAIN, weight_decay=0.3).build(params), params, gradients, RATE)
    decoupled, _ = run(AdamW(**PLAIN, weight_decay=0.3).build(params), params, gradients, RATE)
    assert difference(coupled, decoupled) > 1e-3


@evidence("E19", oracle="optax.sgd", code="llmjax.train.optimizers.sgd.SGD")
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_sgd_is_optax(evidence, momentum, nesterov):
    oracle = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(RATE, momentum, nesterov))
    config = SGD(**PLAIN, weight_decay=0.1, momentum=momentum, nesterov=nesterov)
    evidence.record(disagreement(config, oracle, small()), ULPS)


@evidence(
    "E19", oracle="closed form of SGD with momentum under a constant gradient", code="llmjax.train.optimizers.sgd"
)
def test_momentum_sums_a_geometric_series(evidence):
    params = {"x": jnp.zeros(3)}
    after, _ = run(SGD(**PLAIN, momentum=0.5).build(params), params, [{"x": jnp.ones(3)}] * 8, 1.0)
    expected = -sum((1 - 0.5**t) / 0.5 for t in range(1, 9))
    evidence.record(np.abs(after["x"] - expected).max(), 0.0)  # sums of powers of two are exact


@evidence("E19", oracle="optax.rmsprop", code="llmjax.train.optimizers.rmsprop.RMSprop")
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_rmsprop_is_optax(evidence, momentum):
    config = RMSprop(**PLAIN, decay=0.9, eps=1e-5, momentum=momentum)
    oracle = optax.rmsprop(RATE, 0.9, 1e-5, eps_in_sqrt=False, momentum=momentum or None)
    evidence.record(disagreement(config, oracle, small()), ULPS)


def test_lion_is_optax():
    config, oracle = Lion(**PLAIN, weight_decay=0.3, b1=0.8, b2=0.9), optax.lion(RATE, 0.8, 0.9, weight_decay=0.3)
    assert disagreement(config, oracle, small()) <= ULPS


@evidence("E20", oracle="optax.adafactor", code="llmjax.train.optimizers.adafactor.Adafactor")
@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_is_optax(evidence, relative):
    config = Adafactor(**PLAIN, weight_decay=0.2, relative=relative, momentum=0.6, factor_from=4, update_clip=1.5)
    oracle = optax.adafactor(
        RATE,
        min_dim_size_to_factor=4,
        multiply_by_parameter_scale=relative,
        clipping_threshold=1.5,
        momentum=0.6,
        weight_decay_rate=RATE * 0.2,
    )
    evidence.record(disagreement(config, oracle, small()), ULPS)


@evidence(
    "E20", oracle="a squared gradient of rank 1 is its own factorisation", code="llmjax.train.optimizers.adafactor"
)
def test_adafactor_is_exact_at_rank_one(evidence):
    rng = np.random.default_rng(0)
    gradient = {"w": jnp.asarray(np.outer(rng.normal(size=9), rng.normal(size=7)), jnp.float32)}
    params = {"w": jnp.zeros((9, 7))}
    after, _ = run(Adafactor(**PLAIN, relative=False, factor_from=2).build(params), params, [gradient], 1.0)
    # the first second moment is g^2, so the step is the sign of g; float32 means and roots of nine numbers
    evidence.record(np.abs(after["w"] + np.sign(gradient["w"])).max(), 1e-5)


@evidence("E20", oracle="sizes: 4096^2 / (4096 + 4096) = 2048", code="llmjax.train.optimizers.adafactor.per_matrix")
def test_adafactor_memory_of_a_stacked_attention_kernel(evidence):
    kernel = jax.ShapeDtypeStruct((2, 4096, 32, 128), jnp.float32)
    params = {"blocks": {"0": {"mixer": {"query": {"kernel": kernel}}}}}
    state = jax.eval_shape(Adafactor().build(params).init, params)
    adam = jax.eval_shape(AdamW().build(params).init, params)
    sizes = [sum(math.prod(x.shape) for x in jax.tree.leaves(s)) for s in (state, adam)]
    # beside the factors there are a few scalars a layer
    evidence.record(abs(sizes[1] / 2 / sizes[0] - 2048), 2.0)


@pytest.mark.slow
def test_adafactor_treats_each_layer_alone():
    params, gradients = model(), [jax.tree.map(lambda p: p * 0.1, model(1)), model(2)]
    config = Adafactor(**PLAIN, factor_from=4, momentum=0.5)
    stacked, _ = run(config.build(params), params, gradients, RATE)
    for layer in range(LAYERS):
        alone = functools.partial(one_layer, layer=layer)
        after, _ = run(config.build(alone(params)), alone(params), [alone(g) for g in gradients], RATE)
        chex.assert_trees_all_close(alone(stacked), after, atol=ULPS)


def test_matrix_axes():
    assert matrix_axes("blocks/0/mixer/query/kernel", 4) == ((1,), (2, 3))
    assert matrix_axes("blocks/0/mixer/out/kernel", 4) == ((1, 2), (3,))
    assert matrix_axes("blocks/1/mlp/up/kernel", 3) == ((1,), (2,))
    assert matrix_axes("head/kernel", 2) == ((0,), (1,))
    with pytest.raises(ConfigError, match="'blocks/0/moe/up/kernel' are inputs"):
        matrix_axes("blocks/0/moe/up/kernel", 4)


def kernels(tree):
    """Every kernel of the blocks as `[layers, inputs, outputs]`, by name."""
    block = tree["blocks"]["0"]
    mixer = {name: block["mixer"][name]["kernel"].reshape(LAYERS, D_MODEL, -1) for name in ("query", "key", "value")}
    out = block["mixer"]["out"]["kernel"].reshape(LAYERS, -1, D_MODEL)
    return mixer | {"out": out, "up": block["mlp"]["up"]["kernel"], "down": block["mlp"]["down"]["kernel"]}


def one_layer(tree, layer):
    """The matrices of one layer, as an unstacked tree."""
    return {name: kernel[layer] for name, kernel in kernels(tree).items()}


def well_conditioned(tree):
    """Gradients whose layers' matrices have singular values between 0.5 and 1, so that five iterations converge."""

    def condition(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "blocks" not in name or not name.endswith("kernel"):
            return leaf
        split = (LAYERS, HEADS * HEAD_DIM, D_MODEL) if "out" in name else (LAYERS, leaf.shape[1], -1)
        u, _, v = np.linalg.svd(np.asarray(leaf).reshape(split), full_matrices=False)
        return jnp.asarray(u * np.linspace(0.5, 1, u.shape[-1]) @ v).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(condition, tree)


@pytest.mark.parametrize("settings", [{}, {"preconditioning": "aol", "steps": 4}])
def test_muon_orthogonalises_each_layer(settings):
    params = model()
    gradients = well_conditioned(model(1))
    after, _ = run(Muon(**PLAIN, weight_decay=0, **settings).build(params), params, [gradients], 1.0)
    for name, before in kernels(params).items():
        update = kernels(after)[name] - before
        singular = np.linalg.svd(update, compute_uv=False) / (0.2 * math.sqrt(max(update.shape[1:])))
        chex.assert_shape(singular, (LAYERS, D_MODEL))
        # Jordan's coefficients map the singular values into 0.68 .. 1.21, not to 1
        assert singular.min() > 0.65, name
        assert singular.max() < 1.25, name


@pytest.mark.parametrize("rms", [None, 0.2])
def test_muon_on_stacked_layers_is_optax_on_each_layer(rms):
    params, gradients = model(), [model(i) for i in range(1, 4)]
    config = Muon(**PLAIN, weight_decay=0.1, rms=rms)
    after, _ = run(config.build(params), params, gradients, RATE)
    oracle = optax.contrib.muon(RATE, weight_decay=0.1, consistent_rms=rms)
    for layer in range(LAYERS):
        alone = functools.partial(one_layer, layer=layer)
        theirs, _ = run(oracle, alone(params), [alone(g) for g in gradients])
        # five iterations of products of 16 to 48 terms magnify the rounding of their order
        chex.assert_trees_all_close(alone(after), theirs, atol=2e-5)


def test_muon_leaves_the_rest_to_adamw():
    params, gradients = model(), [model(i) for i in range(1, 4)]
    muon, _ = run(Muon(adam=r"mlp/down", adam_learning_rate=0.5).build(params), params, gradients, RATE)
    adam, _ = run(AdamW(weight_decay=0.2).build(params), params, gradients, RATE / 2)
    differs = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()) > ULPS, muon, adam)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(differs)}
    expected = {f"blocks/0/mixer/{n}/kernel" for n in ("query", "key", "value", "out")} | {"blocks/0/mlp/up/kernel"}
    assert {path for path, different in named.items() if different} == expected


def quadratic(params):
    return sum(0.5 * jnp.sum(jnp.arange(1.0, x.size + 1) * x.ravel() ** 2) for x in jax.tree.leaves(params))


def test_sophia_is_optax():
    config = Sophia(**PLAIN, weight_decay=0.1, gamma=0.5, interval=3)
    oracle = optax.contrib.sophia(RATE, eps=1e-12, weight_decay=0.1, gamma=0.5, update_interval=3)
    assert disagreement(config, oracle, small(), obj_fn=quadratic) <= ULPS


def test_sophia_divides_by_the_curvature_and_skips_frozen_parameters():
    params = small()
    config = Sophia(**PLAIN, weight_decay=0, b1=0, b2=0, gamma=1, interval=1, groups=(Group("vector", frozen=True),))

    def loss(tree):  # its curvature depends on the frozen parameter, which is 2
        return 0.5 * tree["vector"].mean() * quadratic({"matrix": tree["matrix"]})

    params["vector"] = jnp.full(4, 2.0)
    gradient = jax.grad(loss)(params)
    after, _ = run(config.build(params), params, [gradient] * 2, 0.1, obj_fn=loss)
    chex.assert_trees_all_equal(after["vector"], params["vector"])
    # first the sign (no curvature yet), then g / h with the exact diagonal h = 1, 2, 3, ..., clipped to 1
    newton = np.clip(np.asarray(params["matrix"]), -1, 1)
    expected = params["matrix"] - 0.1 * np.sign(params["matrix"]) - 0.1 * newton
    chex.assert_trees_all_close(after["matrix"], expected, atol=ULPS)


def test_hutchinson_estimates_without_bias():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5)) / 2
    hessian = jnp.asarray(root @ root.T, jnp.float32)
    params = {"x": jnp.zeros(5)}
    tx = optax.contrib.hutchinson_estimator_diag_hessian()
    keep = jax.jit(lambda s: tx.update(params, s, params, obj_fn=lambda p: 0.5 * p["x"] @ hessian @ p["x"]))
    state, total, draws = tx.init(params), 0.0, 400
    for _ in range(draws):
        estimate, state = keep(state)
        total = total + estimate["x"]
    # variance of a draw is twice the squared off-diagonal row; five standard errors
    off = hessian - jnp.diag(jnp.diag(hessian))
    error = np.abs(total / draws - jnp.diag(hessian)) / np.sqrt((off**2).sum(1) / draws)
    assert error.max() < 5


def test_schedule_free_is_optax():
    params, gradients = small(), [small(i) for i in range(1, 6)]
    config = ScheduleFree(**PLAIN, weight_decay=0.1, b2=0.99)
    oracle = optax.contrib.schedule_free_adamw(RATE, b2=0.99, weight_decay=0.1)
    ours, state = run(config.build(params), params, gradients, RATE)
    theirs, reference = run(oracle, params, gradients)
    chex.assert_trees_all_close(ours, theirs, atol=ULPS)
    expected = optax.contrib.schedule_free_eval_params(reference, theirs)
    chex.assert_trees_all_close(config.eval_params(state, ours), expected, atol=1e-5)


def is_average(node):
    return isinstance(node, optax.contrib.ScheduleFreeState)


@pytest.mark.slow
def test_schedule_free_evaluates_the_mean_of_the_iterates():
    params = model()
    config = ScheduleFree(clip=None, groups=(Group("head", frozen=True),))
    tx, y, iterates = config.build(params), params, []
    state = set_learning_rate(tx.init(params), RATE)
    for i in range(1, 5):
        updates, state = tx.update(model(i), state, y)
        y = optax.apply_updates(y, updates)
        iterates += [node.z["embed"] for node in jax.tree.leaves(state, is_leaf=is_average) if is_average(node)]
    x = config.eval_params(state, y)
    chex.assert_trees_all_equal(x["head"], params["head"])
    mean = jax.tree.map(lambda *z: sum(z) / len(z), *iterates)
    chex.assert_trees_all_close(x["embed"], mean, atol=1e-5)  # x is recovered from y by a division by b1
    assert difference(x["embed"], y["embed"]) > 1e-3
    chex.assert_trees_all_equal(AdamW().eval_params(state, y), y)


def test_groups_set_rate_and_decay_by_path():
    params, gradient = model(), model(1)
    groups = (Group("embed", learning_rate=0.1), Group("blocks.*kernel|embed", weight_decay=0.5))
    config = SGD(momentum=0, clip=None, weight_decay=0.2, groups=groups)
    after, _ = run(config.build(params), params, [gradient], RATE)
    expected = {"embed": (0.1, 0.2), "blocks": (1.0, 0.5), "head": (1.0, 0.2), "final_norm": (1.0, 0.0)}

    def step(path, p, g):
        multiplier, decay = expected[path[0].key]
        decay = 0.0 if path[-1].key in ("bias", "scale") else decay
        return p - RATE * multiplier * (g + decay * p)

    chex.assert_trees_all_close(after, jax.tree_util.tree_map_with_path(step, params, gradient), atol=ULPS)


@pytest.mark.parametrize("kind", [AdamW, Muon, Adafactor, ScheduleFree])
def test_frozen_parameters_stay_and_have_no_state(kind):
    params = model()
    config = kind(groups=(Group("blocks/", frozen=True), Group("embed", frozen=True)))
    after, state = run(config.build(params), params, [model(1)] * 2, RATE)
    chex.assert_trees_all_equal((after["blocks"], after["embed"]), (params["blocks"], params["embed"]))
    assert difference(after["head"], params["head"]) > 1e-3
    alone = {"head": params["head"], "final_norm": params["final_norm"]}
    sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in (state, kind().build(alone).init(alone))]
    assert sizes[0] == sizes[1]


def test_clip_does_not_see_frozen_gradients():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1e6, 1e6])}
    config = SGD(momentum=0, clip=1.0, groups=(Group("b", frozen=True),))
    after, _ = run(config.build(params), params, [gradient], 1.0)
    chex.assert_trees_all_close(after["a"], jnp.array([-0.6, -0.8]), atol=ULPS)


@evidence("E29", oracle="optax.clip_by_global_norm", code="llmjax.train.optimizers.base.Optimizer.clip")
@evidence("E29", oracle="closed form g * min(1, c / |g|)", code="llmjax.train.optimizers.base.Optimizer.clip")
@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_clip_is_by_global_norm(evidence, clip):
    params, gradient = model(), model(1)
    after, _ = run(SGD(momentum=0, clip=clip).build(params), params, [gradient], 1.0)
    clipped, _ = optax.clip_by_global_norm(clip).update(gradient, optax.EmptyState())
    norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(gradient)))
    closed = jax.tree.map(lambda g: g * min(1.0, clip / norm), gradient)
    step = jax.tree.map(lambda p, a: p - a, params, after)
    for oracle in (clipped, closed):
        evidence.record(difference(step, oracle), 1e-6)  # the subtraction from parameters of size 3 rounds to 2e-7


@evidence("E29", oracle="the same update on one device", code="llmjax.train.optimizers.base.Optimizer.clip")
@pytest.mark.devices(4)
def test_clip_over_sharded_gradients(evidence):
    params, gradient = model(), model(1)
    tx = SGD(momentum=0, clip=0.5).build(params)
    expected, _ = run(tx, params, [gradient], 1.0)
    mesh = jax.make_mesh((4,), ("data",))
    split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    shardings = jax.tree.map(lambda p: whole if p.shape[0] % 4 else split, params)
    sharded = jax.device_put((params, gradient), (shardings, shardings))
    after, _ = jax.jit(lambda p, g: run(tx, p, [g], 1.0))(*sharded)
    assert len(after["head"]["kernel"].sharding.device_set) == 4
    evidence.record(difference(jax.device_get(after), jax.device_get(expected)), ULPS)


@evidence("E26", oracle="closed form gamma^(L - l)", code="llmjax.train.optimizers.base.Optimizer.layer_decay")
def test_layer_decay_on_stacked_layers(evidence):
    shapes = {str(i): {"mlp": {"up": {"kernel": (LAYERS, 2, 2)}}} for i in range(2)}
    params = normal({"embed": {"embedding": (4, 2)}, "blocks": shapes, "head": {"kernel": (2, 4)}})
    ones, zeros = jax.tree.map(jnp.ones_like, params), jax.tree.map(jnp.zeros_like, params)
    updates, _ = run(SGD(**PLAIN, momentum=0, layer_decay=0.5).build(zeros), zeros, [ones], 1.0)
    total = 2 * LAYERS
    for repeat in range(LAYERS):
        for position in range(2):
            layer = 2 * repeat + position + 1
            update = updates["blocks"][str(position)]["mlp"]["up"]["kernel"][repeat]
            evidence.record(float(jnp.abs(update + 0.5 ** (total - layer)).max()), 0.0)  # powers of two are exact
    evidence.record(float(jnp.abs(updates["embed"]["embedding"] + 0.5**total).max()), 0.0)
    evidence.record(float(jnp.abs(updates["head"]["kernel"] + 1).max()), 0.0)


EVERY = sorted(subclasses(Optimizer).items())


def test_the_names_the_command_line_knows():
    names = ["Adafactor", "Adam", "AdamW", "GatedAdamW", "Lion", "Muon", "RMSprop", "RankBudgetAdamW", "SGD"]
    assert [name for name, _ in EVERY] == [*names, "ScheduleFree", "Sophia"]


# Those that prune adapters are tested beside them: they refuse a model that has none.
FOR_ANY_MODEL = {name: kind for name, kind in EVERY if name not in ("GatedAdamW", "RankBudgetAdamW")}


@pytest.mark.parametrize("kind", FOR_ANY_MODEL.values(), ids=FOR_ANY_MODEL)
def test_learning_rate_is_an_argument_of_the_compiled_step(kind):
    config, params, gradient = kind(), model(), model(1)
    tx = config.build(jax.eval_shape(lambda: params))
    extra = {"obj_fn": quadratic} if config.needs_objective else {}

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, rate):
        updates, state = tx.update(gradient, set_learning_rate(state, rate), params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    chex.assert_trees_all_close(step(params, state, 0.0)[0], params, atol=ULPS)
    small, _ = step(params, state, 1e-3)
    large, after = step(params, state, 2e-3)
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    double = jax.tree.map(lambda p, s: p + 2 * (s - p), params, small)
    if kind is not ScheduleFree:  # whose averaging weights depend on the rate
        chex.assert_trees_all_close(large, double, atol=2e-6)
    direct = config.transform(2e-3, params)
    expected, _ = run(direct, params, [gradient], **extra)
    chex.assert_trees_all_close(large, expected, atol=2e-6)


@pytest.mark.parametrize("kind", [kind for _, kind in EVERY], ids=[name for name, _ in EVERY])
def test_defaults_are_valid_and_survive_saving(kind):
    config = kind(groups=(Group("embed", frozen=True),))
    validate(config)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdamW(b1=1.0), r"b1=1.0 is not in \[0, 1\)"),
        (AdamW(eps=0.0), "eps=0.0 is not positive"),
        (AdamW(weight_decay=-0.1), "weight_decay=-0.1 is negative"),
        (AdamW(clip=0.0), "clip=0.0 is not positive"),
        (AdamW(no_decay="("), r"no_decay=\( is no regular expression"),
        (AdamW(layer_decay=1.5), "layer_decay=1.5 is not in"),
        (AdamW(groups=(Group("a", learning_rate=-1.0),)), "groups.0.learning_rate=-1.0 is negative"),
        (AdamW(groups=(Group("a", learning_rate=0.5, frozen=True),)), "groups.0.frozen=True leaves"),
        (SGD(momentum=0.0, nesterov=True), "nesterov=True needs momentum"),
        (RMSprop(decay=-0.1), "decay=-0.1"),
        (Adafactor(update_clip=0.5), "update_clip=0.5 is below 1"),
        (Lion(b2=2.0), "b2=2.0"),
        (Muon(steps=0), "steps=0 is below 1"),
        (Muon(adam="["), "adam=. is no regular"),
        (Sophia(interval=0), "interval=0 is below 1"),
        (ScheduleFree(b1=0.0), "b1=0.0 is not in"),
    ],
)
def test_bad_values(config, message):
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdamW(groups=(Group("foo"),)), r"^optimizer.groups.0.path='foo' matches no parameter: nearest are "),
        (AdamW(groups=(Group("embed"), Group("head/kernl"))), r"groups.1.path='head/kernl' .* nearest are head/kernel"),
        (
            AdamW(groups=(Group("blocks"), Group("mlp"))),
            "groups.1.path='mlp' matches only parameters of earlier groups",
        ),
        (AdamW(no_decay="foo"), "optimizer.no_decay='foo' matches no parameter"),
        (Muon(adam="foo"), "optimizer.adam='foo' matches no parameter"),
    ],
)
def test_patterns_without_effect(config, message):
    with pytest.raises(ConfigError, match=message):
        config.build(model())


def test_a_model_without_norms_needs_no_pattern():
    params = {"w": jnp.ones((2, 2))}
    after, _ = run(dataclasses.replace(AdamW(), weight_decay=0.5).build(params), params, [params], RATE)
    assert difference(after, params) > RATE
