"""Feed-forward layers against explicit formulas and library activations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mlp import GLU, MLP, activation
from tests.evidence import evidence

GRID = np.linspace(-6, 6, 2001)
EXACT = np.asarray([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in GRID])


@evidence("A32", oracle="math.erf in float64", code="llmjax.nn.mlp.activation")
def test_exact_gelu_is_erf(evidence):
    evidence.record(np.abs(np.asarray(activation("gelu")(jnp.asarray(GRID))) - EXACT).max(), 2e-6)


@pytest.mark.parametrize(("name", "known"), [("gelu_tanh", 4.7e-4), ("gelu_quick", 0.0203)])
def test_approximations_have_their_known_largest_error(name, known):
    error = np.abs(np.asarray(activation(name)(jnp.asarray(GRID))) - EXACT).max()
    np.testing.assert_allclose(error, known, rtol=0.02)


def test_the_other_activations():
    x = jnp.asarray([-2.0, -0.5, 0.0, 3.0])
    np.testing.assert_array_equal(activation("relu")(x), [0, 0, 0, 3])
    np.testing.assert_array_equal(activation("relu2")(x), [0, 0, 0, 9])
    np.testing.assert_allclose(activation("silu")(x), x / (1 + np.exp(-x)), rtol=1e-6)


@evidence("A33", oracle="explicit float64 formula", code="llmjax.nn.mlp")
def test_mlp_is_its_formula(evidence):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    config = MLP(d_ff=6, activation="relu2", bias=True)
    params = randomised(config, x)
    up, down = ({k: np.asarray(v, np.float64) for k, v in params[name].items()} for name in ("up", "down"))
    hidden = np.maximum(np.asarray(x, np.float64) @ up["kernel"] + up["bias"], 0) ** 2
    expected = hidden @ down["kernel"] + down["bias"]
    ours = config.build(4, 1, GPT2Init()).apply({"params": params}, x)
    evidence.record(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max(), 1e-6)


@evidence("A34", oracle="jax.nn.glu", code="llmjax.nn.mlp")
def test_sigmoid_gate_is_glu(evidence):
    """silu(g) u = g * (sigmoid(g) u): dividing the gate out leaves jax.nn.glu of the concatenated projections."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    config = GLU(d_ff=6)
    params = randomised(config, x)
    gate, up = x @ params["gate"]["kernel"], x @ params["up"]["kernel"]
    expected = (gate * jax.nn.glu(jnp.concatenate([up, gate], axis=-1))) @ params["down"]["kernel"]
    ours = config.build(4, 1, GPT2Init()).apply({"params": params}, x)
    evidence.record(jnp.max(jnp.abs(ours - expected)) / jnp.max(jnp.abs(expected)), 1e-6)


def randomised(config, x):
    from flax.core import meta

    params = meta.unbox(config.build(x.shape[-1], 1, GPT2Init()).init(jax.random.key(1), x)["params"])
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])


def test_default_widths_hold_the_parameters_of_a_4x_mlp():
    assert MLP().matmul_params(768) == 8 * 768**2
    assert GLU().width(4096) == 10944  # 8/3 * 4096 = 10922.7, next multiple of 64
    assert abs(GLU().matmul_params(768) / MLP().matmul_params(768) - 1) < 0.03
