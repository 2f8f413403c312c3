"""Attention against jax.nn.dot_product_attention, explicit loops and laws; float32, so tolerances are a few ulps."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.attention.api import describe
from pallas_kernels.attention.mask import Rule
from pallas_kernels.attention.xla import long_attention
from tests.evidence import evidence

TOLERANCE = 2e-6  # float32 rounding of sums over at most 24 keys of size about 1


def inputs(length=12, key_length=None, heads=4, kv_heads=2, head_dim=8, batch=2):
    keys = jax.random.split(jax.random.key(0), 3)
    kv = (batch, key_length or length, kv_heads, head_dim)
    return (
        jax.random.normal(keys[0], (batch, length, heads, head_dim)),
        jax.random.normal(keys[1], kv),
        jax.random.normal(keys[2], kv),
    )


def worst(a, b):
    chex.assert_equal_shape([a, b])
    return float(jnp.max(jnp.abs(a - b)))


@evidence("A01", oracle="jax.nn.dot_product_attention", code="pallas_kernels.attention")
@evidence("A03", oracle="jax.nn.dot_product_attention", code="pallas_kernels.attention")
@evidence("A08", oracle="jax.nn.dot_product_attention", code="pallas_kernels.attention")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "local_window_size": (3, 0)}, {"local_window_size": (2, 1)}],
    ids=["full", "causal", "causal_window", "window"],
)
def test_agrees_with_jax(implementation, options, evidence):
    q, k, v = inputs()
    ours = attention(q, k, v, implementation=implementation, **options)
    evidence.record(worst(ours, jax.nn.dot_product_attention(q, k, v, **options)), TOLERANCE)


@evidence("A01", oracle="jax.nn.dot_product_attention with bias and mask", code="pallas_kernels.attention")
def test_bias_and_mask_agree_with_jax(evidence):
    q, k, v = inputs()
    bias = jax.random.normal(jax.random.key(3), (2, 4, 12, 12))
    mask = jax.random.bernoulli(jax.random.key(4), 0.7, (2, 1, 12, 12)) | jnp.eye(12, dtype=bool)
    evidence.record(worst(attention(q, k, v, bias, mask), jax.nn.dot_product_attention(q, k, v, bias, mask)), TOLERANCE)


@evidence("A01", oracle="explicit loops in float64", code="pallas_kernels.attention")
def test_agrees_with_loops(evidence):
    q, k, v = (np.asarray(x, np.float64) for x in inputs(length=5))
    expected = np.zeros(q.shape)
    for b, i, h in np.ndindex(2, 5, 4):
        scores = [5.0 * math.tanh(q[b, i, h] @ k[b, j, h // 2] / math.sqrt(8) / 5.0) for j in range(i + 1)]
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[b, i, h] = sum(w * v[b, j, h // 2] for j, w in enumerate(weights))
    ours = attention(*inputs(length=5), is_causal=True, logits_soft_cap=5.0)
    evidence.record(np.abs(np.asarray(ours) - expected).max(), TOLERANCE)


@evidence("A06", oracle="each document attended alone by jax.nn.dot_product_attention", code="pallas_kernels.attention")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_equals_separate(implementation, evidence):
    q, k, v = inputs()
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [2] * 3])
    ours = attention(q, k, v, is_causal=True, segment_ids=segments, implementation=implementation)
    errors = []
    for row, cut in ((0, 5), (1, 9)):
        for part in (slice(None, cut), slice(cut, None)):
            alone = jax.nn.dot_product_attention(*(x[row : row + 1, part] for x in (q, k, v)), is_causal=True)
            errors.append(worst(ours[row : row + 1, part], alone))
    evidence.record(max(errors), TOLERANCE)


@evidence("C02", oracle="jax.nn.dot_product_attention, output and gradients", code="pallas_kernels.attention.xla")
@pytest.mark.parametrize("block", [4, 5, 24], ids=["divides", "ragged", "whole"])
def test_blocks_change_nothing(block, evidence):
    q, k, v = inputs(length=12)
    ends = describe(q, k, None, None)

    def ours(q, k, v):
        return jnp.sum(jnp.sin(long_attention(q, k, v, Rule(True, None), ends, 8**-0.5, None, block)))

    def theirs(q, k, v):
        return jnp.sum(jnp.sin(jax.nn.dot_product_attention(q, k, v, is_causal=True)))

    got, expected = (jax.grad(f, argnums=(0, 1, 2))(q, k, v) for f in (ours, theirs))
    evidence.record(max(map(worst, got, expected)), 5e-6)


@evidence("C02", oracle="jax.nn.dot_product_attention, gradients", code="pallas_kernels.attention.xla")
@pytest.mark.parametrize("length", [3, 12, 13])
@pytest.mark.parametrize("window", [None, (2, 0), (1, 3)])
def test_skipped_keys_are_those_out_of_reach(length, window, evidence):
    q, k, v = inputs(length=length)

    def gradients(f):
        run = lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v, is_causal=window != (1, 3), local_window_size=window)))
        return jax.jit(jax.grad(run, argnums=(0, 1, 2)))(q, k, v)

    evidence.record(max(map(worst, gradients(attention), gradients(jax.nn.dot_product_attention))), 5e-6)


def test_memory_grows_linearly_in_length():
    """Temporary bytes of forward and backward at four times the length: a dense implementation would take 16 times."""

    def step(q, k, v):
        return jax.grad(lambda q: jnp.sum(attention(q, k, v, is_causal=True)))(q)

    def bytes_at(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        return jax.jit(step).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at(8192) < 4.5 * bytes_at(2048)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_query_without_keys_gives_zero_and_finite_gradients(implementation):
    q, k, v = inputs(length=4)
    positions = (jnp.asarray([[0, 1, 2, 3], [-1, -1, 0, 1]]),) * 2

    def f(q, k, v):
        return attention(q, k, v, is_causal=True, positions=positions, implementation=implementation)

    out = f(q, k, v)
    np.testing.assert_array_equal(out[1, :2], 0.0)
    for gradient in jax.grad(lambda *a: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2))(q, k, v):
        chex.assert_tree_all_finite(gradient)
        np.testing.assert_array_equal(gradient[1, :2], 0.0)


def test_causal_jacobian_is_lower_triangular():
    q, k, v = inputs(length=6, batch=1)
    jacobian = jax.jacobian(lambda v: attention(q, k, v, is_causal=True).sum((0, 2, 3)))(v)
    reach = jnp.abs(jacobian).sum((1, 3, 4))
    np.testing.assert_array_equal(np.asarray(reach) != 0, np.tril(np.ones((6, 6), bool)))


def test_a_nan_stays_in_its_row():
    q, k, v = inputs()
    out = attention(q, k.at[0].set(jnp.nan), v, is_causal=True)
    chex.assert_tree_all_finite(out[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 12, 3, 8), "v": (2, 12, 3, 8)}, r"query has shape \(2, 12, 4, 8\), key \(2, 12, 3, 8\)"),
        ({"v": (2, 11, 2, 8)}, r"key has shape \(2, 12, 2, 8\), value \(2, 11, 2, 8\)"),
        ({"segments": (2, 11)}, r"segment_ids .* \(2, 11\), query has \(2, 12, 4, 8\)"),
        ({"q": (2, 12, 32)}, r"query has shape \(2, 12, 32\)"),
    ],
)
def test_shapes_that_disagree_are_named(change, message):
    shapes = {"q": (2, 12, 4, 8), "k": (2, 12, 2, 8), "v": (2, 12, 2, 8), "segments": (2, 12), **change}
    q, k, v = (jnp.zeros(shapes[name]) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, segment_ids=jnp.zeros(shapes["segments"], jnp.int32))


def test_explicit_implementation_never_falls_back():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="takes no bias"):
        attention(q, k, v, jnp.zeros((12, 12)), implementation="xla")
    with pytest.raises(ValueError, match="'fast' is unknown: use one of reference, xla"):
        attention(q, k, v, implementation="fast")
