"""Mixture of experts against a loop over tokens and experts in float64, closed forms and the laws of routing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from llmjax.config import ConfigError, validate
from llmjax.models.llama import llama3
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mixer import Cache, Context
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.moe import MoE
from llmjax.nn.router import Choice, ExpertChoice, TopK, bias_surrogate, load_of
from tests.evidence import evidence

D, LENGTH = 6, 9
TOLERANCE = 3e-6
"""Relative to the largest value: float32 sums of tens of terms, a few units of 6e-8 each, through a sharp router."""
POSITIONS = np.where(np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 3]]), np.arange(LENGTH), -1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(2, LENGTH, D)


def randomised(config, scale=0.7):
    """Normal parameters under the right names."""
    shapes = jax.eval_shape(
        lambda: module(config).init(jax.random.key(0), jnp.asarray(X), Context(jnp.asarray(POSITIONS)))
    )
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda a: rng.normal(0, scale, a.shape).astype(np.float32), meta.unbox(shapes["params"]))


def module(config):
    return config.build(D, 1, GPT2Init())


def run(config, params, x=X, positions=POSITIONS, cache=None):
    """Output, losses and metrics."""
    context = Context(jnp.asarray(positions), cache=cache)
    y, handed_out = module(config).apply({"params": params}, jnp.asarray(x), context, mutable=["losses", "metrics"])
    return y, dict(handed_out.get("losses", {})), dict(handed_out.get("metrics", {}))


def dense(config, params, x):
    """One dense layer on one token, in float64."""
    weight = {name: {leaf: np.asarray(a, np.float64) for leaf, a in p.items()} for name, p in params.items()}

    def project(name, x):
        return x @ weight[name]["kernel"] + weight[name].get("bias", 0)

    if isinstance(config, GLU):
        bound, slope = config.limit or np.inf, 1.702 if config.activation == "gelu_quick" else 1
        gate, up = np.minimum(project("gate", x), bound), np.clip(project("up", x), -bound, bound) + config.shift
        return project("down", gate / (1 + np.exp(-slope * gate)) * up)
    return project("down", np.maximum(project("up", x), 0))


def one_expert(params, e):
    return jax.tree.map(lambda a: a[e], params["experts"])


def scores_of(config, params, x):
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    logits = logits + params["router"].get("logit_bias", 0)
    if getattr(config.router, "scores", "softmax") == "sigmoid":
        return logits, 1 / (1 + np.exp(-logits))
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return logits, exp / exp.sum(-1, keepdims=True)


def in_groups(router, scores):
    """The scores, -inf for those of groups that are not among the best."""
    groups = np.split(scores, router.groups)
    best = sorted(range(router.groups), key=lambda g: -np.sort(groups[g])[-router.group_best :].sum())
    return np.concatenate([x if g in best[: router.top_groups] else x - np.inf for g, x in enumerate(groups)])


def token_choice(config, params, x, positions):
    """Tokens in order, of each its experts from the best; `room` is what an expert has left."""
    y, wanted, dropped = np.zeros(x.shape), np.zeros(config.experts), 0
    router, bias = config.router, np.asarray(params["router"].get("bias", 0.0), np.float64)
    for b in range(x.shape[0]):
        room = np.full(config.experts, np.inf)
        if config.capacity is not None:
            room[:] = math.ceil(config.capacity * router.k * x.shape[1] / config.experts)
        for t in range(x.shape[1]):
            token = np.asarray(x[b, t], np.float64)
            if config.shared:
                y[b, t] += dense(config.expert, params["shared"], token)
            if positions[b, t] < 0:
                continue
            _, scores = scores_of(config, params, token)
            chosen = np.argsort(-in_groups(router, scores + bias), kind="stable")[: router.k]
            for e in chosen:
                wanted[e] += 1
                room[e] -= 1
                if room[e] < 0:
                    dropped += 1
                    continue
                weight = router.scale * scores[e] / (scores[chosen].sum() if router.normalise else 1)
                y[b, t] += weight * dense(config.expert, one_expert(params, e), token)
    return y, wanted / wanted.sum(), dropped / wanted.sum()


CASES = {
    "dense mixture": MoE(3, GLU(d_ff=5), TopK(3)),
    "mixtral": MoE(4, GLU(d_ff=5, bias=True), TopK(2), z_loss=0.3),
    "deepseek": MoE(5, GLU(d_ff=5), TopK(2, "sigmoid", scale=2.5), shared=2, bias_rate=0.1),
    "groups by two": MoE(
        6, GLU(d_ff=5), TopK(2, "sigmoid", scale=2.5, groups=3, top_groups=2, group_best=2), bias_rate=0.1
    ),
    "groups by the best": MoE(6, GLU(d_ff=5), TopK(2, normalise=False, groups=3)),
    "gpt-oss": MoE(4, GLU(5, "gelu_quick", bias=True, limit=0.8, shift=1.0), TopK(2), logit_bias=True),
    "switch": MoE(4, MLP(d_ff=5, activation="relu", bias=True), TopK(1, normalise=False), capacity=0.6),
    "drops of two": MoE(4, GLU(d_ff=5), TopK(2), capacity=0.7),
}


@evidence("A35", oracle="loop over tokens and experts in float64", code="llmjax.nn.moe")
@pytest.mark.parametrize("name", list(CASES))
def test_token_choice_is_its_loop(name, evidence):
    config = CASES[name]
    params = randomised(config)
    y, losses, metrics = jax.jit(lambda p: run(config, p))(params)
    expected, load, dropped = token_choice(config, params, X, POSITIONS)
    evidence.record(np.abs(y - expected).max() / np.abs(expected).max(), TOLERANCE)
    logits, scores = scores_of(config, params, X[POSITIONS >= 0])
    share = (scores / scores.sum(-1, keepdims=True)).mean(0)
    closed = {"balance_loss": config.balance_loss * config.experts * (load * share).sum()}
    if config.z_loss:
        closed["router_z_loss"] = config.z_loss * (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    assert losses.keys() == closed.keys()
    evidence.record(max(abs(losses[key] / closed[key] - 1) for key in closed), TOLERANCE)
    counted = {"max_load": config.experts * load.max()}
    if config.capacity is not None:
        assert 0.05 < dropped < 0.9
        counted["dropped"] = dropped
    assert metrics.keys() == counted.keys()
    evidence.record(max(abs(metrics[key] / counted[key] - 1) for key in counted), TOLERANCE)


@evidence("A35", oracle="loop over experts in float64", code="llmjax.nn.moe")
def test_expert_choice_is_its_loop(evidence):
    config = MoE(4, GLU(d_ff=5), ExpertChoice(0.5), balance_loss=0.0)
    params, room = randomised(config), math.ceil(0.5 * LENGTH / 4)
    expected, taken = np.zeros(X.shape), np.zeros(X.shape[:2], int)
    for b in range(2):
        _, scores = scores_of(config, params, X[b])
        scores[POSITIONS[b] < 0] = -1
        for e in range(4):
            for t in np.argsort(-scores[:, e], kind="stable")[:room]:
                expected[b, t] += scores[t, e] * dense(config.expert, one_expert(params, e), X[b, t])
                taken[b, t] += 1
    y, losses, metrics = jax.jit(lambda p: run(config, p))(params)
    assert config.sees_future()
    assert losses == {}
    assert taken.sum() == 2 * 4 * room
    left_out = (taken == 0)[POSITIONS >= 0].mean()
    assert left_out > 0
    evidence.record(abs(metrics["dropped"] - left_out), 1e-6)
    evidence.record(np.abs(y - expected).max() / np.abs(expected).max(), TOLERANCE)


@evidence("A35", oracle="autodiff of the dense sum over all experts", code="llmjax.nn.dispatch")
@pytest.mark.parametrize("capacity", [None, 4.0], ids=["ragged", "buffers"])
def test_gradients_are_those_of_the_masked_dense_sum(capacity, evidence):
    """Every expert on every token, its weight 0 where it was not chosen: nothing is sorted, gathered or grouped."""
    config = MoE(4, GLU(d_ff=5, bias=True), TopK(2), capacity=capacity, balance_loss=0.0)
    params = randomised(config)
    target = jnp.asarray(normal(*X.shape, seed=9))

    def masked(params, x):
        scores = jax.nn.softmax(x @ params["router"]["kernel"])
        kept = jnp.where(scores >= jnp.sort(scores, axis=-1)[..., -2:-1], scores, 0)
        kept = jnp.where(POSITIONS[..., None] < 0, 0, kept / kept.sum(-1, keepdims=True))
        p = params["experts"]
        gate, up = (jnp.einsum("bld,edf->blef", x, p[n]["kernel"]) + p[n]["bias"] for n in ("gate", "up"))
        y = jnp.einsum("blef,efd->bled", jax.nn.silu(gate) * up, p["down"]["kernel"]) + p["down"]["bias"]
        return jnp.einsum("ble,bled->bld", kept, y)

    def gradients(function):
        return jax.jit(jax.grad(lambda p, x: jnp.sum(target * function(p, x)), argnums=(0, 1)))(params, jnp.asarray(X))

    ours, expected = gradients(lambda p, x: run(config, p, x)[0]), gradients(masked)
    errors = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), ours, expected)
    evidence.record(max(map(float, jax.tree.leaves(errors))), TOLERANCE)


@evidence("A35", oracle="1, and (ln experts)^2", code="llmjax.nn.router")
def test_losses_of_a_uniform_router(evidence):
    config = MoE(4, MLP(d_ff=5), TopK(2), balance_loss=1.0, z_loss=1.0)
    params = randomised(config)
    params["router"]["kernel"] = jnp.zeros((D, 4))
    _, losses, _ = jax.jit(lambda p: run(config, p))(params)
    evidence.record(abs(losses["balance_loss"] - 1), 0)
    evidence.record(abs(losses["router_z_loss"] / math.log(4) ** 2 - 1), 1e-6)


@pytest.mark.parametrize("name", ["mixtral", "drops of two"])
def test_padding_is_not_routed_and_later_tokens_change_nothing(name):
    """Exact: the experts' rows do not mix."""
    config = CASES[name]
    params, both = randomised(config), jax.jit(lambda p, x: run(config, p, x))
    other = np.where((POSITIONS < 0)[..., None], 1e3, X).astype(np.float32)
    one, two = both(params, X), both(params, other)
    np.testing.assert_array_equal(one[0][POSITIONS < 0], 0)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    later = X.copy()
    later[0, 5:] = normal(LENGTH - 5, D, seed=5)
    np.testing.assert_array_equal(one[0][0, :5], both(params, later)[0][0, :5])


def test_a_batch_of_padding_costs_nothing():
    config = dataclasses.replace(CASES["drops of two"], z_loss=1.0)
    y, losses, metrics = jax.jit(lambda p: run(config, p, positions=np.full_like(POSITIONS, -1)))(randomised(config))
    np.testing.assert_array_equal(y, 0)
    assert {name: float(x) for name, x in losses.items()} == {"balance_loss": 0, "router_z_loss": 0}
    assert metrics["max_load"] == 0


def test_decoding_drops_nothing():
    config = MoE(4, GLU(d_ff=5), TopK(2), capacity=0.1)
    params, cache = randomised(config), Cache(jnp.zeros((), jnp.int32), jnp.asarray(POSITIONS))
    free = dataclasses.replace(config, capacity=None)
    decoded, _, metrics = jax.jit(lambda p: run(config, p, cache=cache))(params)
    np.testing.assert_array_equal(decoded, jax.jit(lambda p: run(free, p))(params)[0])
    assert "dropped" not in metrics


def test_permuted_experts_are_the_same_layer_and_one_expert_is_the_plain_layer():
    config, order = CASES["mixtral"], np.array([2, 0, 3, 1])
    params = randomised(config)
    permuted = {"experts": jax.tree.map(lambda a: a[order], params["experts"])}
    permuted["router"] = {"kernel": params["router"]["kernel"][:, order]}
    both = jax.jit(lambda p: run(config, p)[0])
    np.testing.assert_allclose(both(permuted), both(params), rtol=0, atol=1e-5)
    single = MoE(1, config.expert, TopK(1, normalise=False))
    params = randomised(single)
    plain = config.expert.build(D, 1, GPT2Init()).apply({"params": one_expert(params, 0)}, X)
    np.testing.assert_allclose(jax.jit(lambda p: run(single, p)[0])(params)[0], plain[0], rtol=0, atol=1e-5)


@evidence("A35", oracle="rate sign(load - mean load)", code="llmjax.nn.router.bias_surrogate")
def test_bias_gradient_is_the_update_that_balances(evidence):
    """The loss is 0 and the gradient the published step; taking it makes a lopsided router's load even."""
    router, rate = TopK(2, "sigmoid"), 0.005
    logits = jnp.asarray(normal(4, 64, 8)) + jnp.linspace(-1.5, 1.5, 8)
    present = jnp.ones((4, 64), bool)

    def loss(bias):
        load = load_of(router.route(logits, present, bias), 8)
        return bias_surrogate(bias, load, rate), load

    @jax.jit
    def balance(bias):
        def step(bias, _):
            (value, load), gradient = jax.value_and_grad(loss, has_aux=True)(bias)
            return bias - gradient, (value, load, gradient)

        return jax.lax.scan(step, bias, length=400)[1]

    values, loads, gradients = balance(jnp.zeros(8))
    np.testing.assert_array_equal(values, 0)
    evidence.record(np.abs(gradients - rate * np.sign(np.asarray(loads) - 1 / 8)).max(), 0)
    assert 8 * loads[0].max() > 2
    assert 8 * loads[-1].max() < 1.1


def test_bias_changes_the_choice_and_not_the_weights():
    logits, router = jnp.asarray(normal(1, 7, 4)), TopK(2, normalise=False)
    free, biased = (router.route(logits, jnp.ones((1, 7), bool), b) for b in (None, jnp.array([0.0, 0, 0, 9.0])))
    assert (biased.experts[..., 0] == 3).all()
    assert not (free.experts[..., 0] == 3).all()
    np.testing.assert_array_equal(biased.weights[..., 0], jax.nn.softmax(logits)[..., 3])


def test_weights_of_bfloat16_are_routed_in_float32():
    config = CASES["mixtral"]
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), randomised(config))
    x = jnp.asarray(X, jnp.bfloat16)
    context = Context(jnp.asarray(POSITIONS))
    y, sites = jax.jit(lambda p: module(config).apply({"params": p}, x, context, mutable=["sites"]))(params)
    logits = sites["sites"]["router_logits"]
    exact = np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    assert (y.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.abs(logits - exact).max() < 1e-5  # bfloat16 products would be off by 1e-2


def test_load_counts_only_pairs_that_exist():
    experts = jnp.array([[[0, 1], [1, 2], [3, 3]]])  # of three experts: the last token is absent
    np.testing.assert_allclose(load_of(Choice(experts, jnp.ones((1, 3, 2))), 3), [0.25, 0.5, 0.25])


@evidence("A35", oracle="published sizes of Mixtral 8x7B: 46.7B parameters, 12.9B a token", code="llmjax.nn.moe")
def test_mixtral_has_its_published_size(evidence):
    config = llama3("8B")
    block = dataclasses.replace(config.pattern[0], mlp=MoE(8, GLU(d_ff=14336), TopK(2)))
    config = dataclasses.replace(config, vocab=32000, pattern=(block,))
    evidence.record(abs(config.num_params() / 46.7e9 - 1), 2e-3)
    active = 32 * block.matmul_params(4096) + 2 * 32000 * 4096
    evidence.record(abs(active / 12.9e9 - 1), 2e-3)


def test_active_weights_are_counted():
    """The router, two of five experts, and two shared ones in one layer of twice the width."""
    config = CASES["deepseek"]
    assert randomised(config)["shared"]["up"]["kernel"].shape == (D, 2 * 5)
    assert config.matmul_params(D) == D * 5 + (2 + 2) * 3 * D * 5


BAD = {
    "experts=0 must be at least 1": MoE(0, router=ExpertChoice(0.5), balance_loss=0.0),
    "router.k=9 must be from 1 to experts=8": MoE(router=TopK(9)),
    "router.normalise=True makes the weight of k=1 always 1": MoE(router=TopK(1)),
    "router.k=5 must be from 1 to experts=4, those of 2 groups": MoE(router=TopK(5, groups=4, top_groups=2)),
    "router.groups=3 must divide experts=8": MoE(router=TopK(groups=3)),
    "router.top_groups=3 must be from 1 to groups=2": MoE(router=TopK(groups=2, top_groups=3)),
    "router.group_best=3 must be from 1 to the 2 experts of a group": MoE(
        router=TopK(groups=4, top_groups=2, group_best=3)
    ),
    "router.scale=0.0 must be positive": MoE(router=TopK(scale=0.0)),
    "router.capacity=9.0 must be above 0 and at most experts=8": MoE(router=ExpertChoice(9.0), balance_loss=0.0),
    "capacity=0.0 must be positive, or None": MoE(capacity=0.0),
    "bias_rate=-1.0 must be positive, or None": MoE(bias_rate=-1.0),
    "z_loss=-1.0 must not be negative": MoE(z_loss=-1.0),
    "shared=-1 must not be negative": MoE(shared=-1),
    "balance_loss=0.01 has no effect on ExpertChoice": MoE(router=ExpertChoice()),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_configs_are_named_in_one_line(message):
    with pytest.raises(ConfigError) as error:
        validate(BAD[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    validate(MoE())
