"""Distance biases: closed forms, brute force in float64, and attention with and without the folding of ALiBi."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError, validate
from llmjax.nn.alibi import ALiBi, alibi_slopes, extend
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.t5_bias import T5Bias, bucket
from pallas_kernels.attention import attention
from tests.evidence import evidence

HEADS, KV_HEADS = 6, 3


def arrays(dtype=jnp.float32, length=9, source=9, head_dim=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, HEADS, head_dim), *2 * [(2, source, KV_HEADS, head_dim)]]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def table_of(config, heads=HEADS):
    module = config.build(heads, GPT2Init(1.0), "distance")
    return nn.meta.unbox(module.init_with_output(jax.random.key(3)))


@evidence("A28", oracle="the paper's slopes, worked by hand for 8, 12 and 16 heads", code="llmjax.nn.alibi")
def test_slopes(evidence):
    eight = [2.0**-h for h in range(1, 9)]
    sixteen = [2.0 ** (-h / 2) for h in range(1, 17)]
    expected = {1: [2**-8], 8: eight, 12: eight + sixteen[0:8:2], 16: sixteen, 3: [2**-4, 2**-8, 2**-2]}
    for heads, slopes in expected.items():
        evidence.record(np.abs(alibi_slopes(heads) / slopes - 1).max(), 1e-15)


@evidence("A28", oracle="double loop in float64", code="llmjax.nn.alibi")
def test_alibi_scores(evidence):
    """Slopes are rounded to float32 (2^-24), products once more."""
    where, seen = np.array([[3, 4, 5], [0, 7, -1]]), np.array([[0, 3, 9, 5], [1, 0, 7, -1]])
    table, params = table_of(ALiBi())
    assert not params
    ours = np.asarray(ALiBi().scores(table, jnp.asarray(where), jnp.asarray(seen), False))
    for b, h, i, j in np.ndindex(*ours.shape):
        expected = -alibi_slopes(HEADS)[h] * abs(float(where[b, i] - seen[b, j]))
        evidence.record(abs(ours[b, h, i, j] - expected), 1.2e-7 * abs(expected))


@evidence("A28", oracle="q k scale + slope (j - i) in float64", code="llmjax.nn.alibi")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("span", [50, 4_000, 250_000])
def test_queries_and_keys_carry_the_slopes(dtype, span, evidence):
    """Twelve terms, each rounded to 2^-24 of the largest partial sum; the arrays themselves are exact in both dtypes.

    The product is taken in float32, as attention kernels take it.
    """
    q, k, _ = arrays(dtype)
    rng, scale = np.random.default_rng(0), 1 / math.sqrt(8)
    where, seen = rng.integers(0, span, (2, 9)) + 10**6, rng.integers(0, span, (2, 9)) + 10**6
    slopes = np.float32(alibi_slopes(HEADS))

    @jax.jit
    def scores(q, k):
        q, k = extend(q, k, jnp.asarray(slopes), jnp.asarray(where), jnp.asarray(seen), scale)
        assert q.dtype == k.dtype == dtype
        q = q.reshape(2, 9, KV_HEADS, 2, -1)
        return jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * scale

    wide_q, wide_k = (np.asarray(x, np.float64) for x in (q, k))
    plain = np.einsum("bthd,bshd->bhts", wide_q, np.repeat(wide_k, 2, axis=2)) * scale
    distance = seen[:, None, None, :] - where[:, None, :, None]
    expected = plain + np.float64(slopes)[:, None, None] * distance
    error = np.abs(np.asarray(scores(q, k), np.float64).reshape(expected.shape) - expected)
    largest = 10 + slopes[:, None, None] * span
    evidence.record((error / largest).max(), 12 * 2.0**-24)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decoding_far_into_a_document_is_as_exact_as_at_its_start(dtype):
    """One query is its own reference point: the nearest keys' scores lose nothing at position two million."""
    q, k, _ = arrays(dtype, length=1, source=4)
    where, seen = jnp.full((2, 1), 2_000_000), 2_000_000 - jnp.arange(4)[None].repeat(2, 0)
    slopes = jnp.asarray(alibi_slopes(HEADS), jnp.float32)
    wide_q, wide_k = extend(q, k, slopes, where, seen, 1.0)
    ours = jnp.einsum("bthd,bshd->bhts", wide_q, jnp.repeat(wide_k, 2, axis=2), preferred_element_type=jnp.float32)
    plain = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, axis=2), preferred_element_type=jnp.float32)
    expected = -jnp.broadcast_to(slopes[:, None, None] * jnp.arange(4), ours.shape)
    np.testing.assert_allclose(ours - plain, expected, atol=4e-6)  # two sums of up to 20 in float32


@evidence("A28", oracle="attention with the bias written out", code="llmjax.nn.alibi")
@pytest.mark.parametrize("sinks", [False, True])
def test_folded_attention_is_biased_attention(sinks, evidence):
    """Output and gradients, also where a sink takes part in the softmax: no row is shifted by a constant."""
    config, (q, k, v) = ALiBi(), arrays()
    where = jnp.asarray([[*range(9)], [0, 1, 2, 3, 0, 1, 2, -1, -1]])
    segments = jnp.asarray([[0] * 9, [0, 0, 0, 0, 1, 1, 1, -1, -1]])
    table, _ = table_of(config)
    options = {"is_causal": True, "segment_ids": segments, "scale": 0.3, "implementation": "reference"}
    options |= {"sinks": jnp.linspace(-1, 2, HEADS)} if sinks else {}

    def folded(q, k, v):
        q, k, bias = config.fold(table, q, k, where, where, 0.3, True)
        assert bias is None
        return attention(q, k, v, **options)

    def written_out(q, k, v):
        return attention(q, k, v, config.scores(table, where, where, True), **options)

    def with_gradients(function):
        def run(*arrays):
            out, pull = jax.vjp(function, *arrays)
            return out, *pull(out**2)

        return jax.jit(run)(q, k, v)

    for ours, theirs in zip(with_gradients(folded), with_gradients(written_out), strict=True):
        evidence.record(jnp.abs(ours - theirs).max(), 1e-5)


def test_alibi_is_written_out_where_it_cannot_be_folded():
    """Both directions, and float16, whose largest number is below the positions'."""
    where = jnp.arange(9)[None].repeat(2, 0)
    table, _ = table_of(ALiBi())
    for dtype, causal in ((jnp.float32, False), (jnp.float16, True)):
        q, k, _ = arrays(dtype)
        same_q, same_k, bias = ALiBi().fold(table, q, k, where, where, 1.0, causal)
        assert same_q is q
        assert same_k is k
        np.testing.assert_array_equal(bias, ALiBi().scores(table, where, where, causal))


@evidence("A27", oracle="the paper's bucket formula with logarithms in float64", code="llmjax.nn.t5_bias")
@pytest.mark.parametrize(("buckets", "far"), [(16, 128), (32, 128), (5, 20)])
def test_buckets(buckets, far, evidence):
    """Away from the bounds of buckets, where rounding of a logarithm decides, both must agree."""
    exact = buckets // 2
    for distance in range(2 * far):
        place = exact + math.log(max(distance, 1) / exact) / math.log(far / exact) * (buckets - exact)
        expected = distance if distance < exact else min(math.floor(place + 1e-9), buckets - 1)
        evidence.record(abs(bucket(distance, buckets, far) - expected), 0)


@evidence("A27", oracle="loop over pairs", code="llmjax.nn.t5_bias")
@pytest.mark.parametrize("causal", [True, False])
def test_t5_scores(causal, evidence):
    """Also packed and cached positions; distances beyond the last bucket share it. Table entries, so exact."""
    config = T5Bias(8, 20)
    where, seen = np.array([[3, 40, 5], [0, 7, 9]]), np.array([[0, 3, 70, 5], [1, 0, 7, -1]])
    table, params = table_of(config)
    assert params["params"]["embedding"].shape == (HEADS, 8)
    ours = np.asarray(jax.jit(functools.partial(config.scores, causal=causal))(table, where, seen))
    for b, h, i, j in np.ndindex(*ours.shape):
        ahead = int(seen[b, j] - where[b, i])
        side = 4 if ahead > 0 and not causal else 0
        distance = max(-ahead, 0) if causal else abs(ahead)
        entry = side + bucket(distance, 8 if causal else 4, 20)
        evidence.record(abs(ours[b, h, i, j] - table[h, entry]), 0)


def test_t5_table_gets_the_gradient_of_its_pairs():
    """d sum(scores) / d table counts pairs: exact in float32."""
    config, where = T5Bias(8, 20), jnp.arange(6)[None]
    counts = jax.jit(jax.grad(lambda t: config.scores(t, where, where, True).sum()))(jnp.zeros((1, 8)))
    # distances 0..5 of 6 tokens occur 6 + 15, 5, 4, 3, 2, 1 times (keys ahead count as 0); 4 and 5 share bucket 4
    np.testing.assert_array_equal(counts[0], [21, 5, 4, 3, 3, 0, 0, 0])


def test_logical_axes():
    """Tables are split like heads."""
    boxed = jax.eval_shape(T5Bias().build(HEADS, GPT2Init()).init, jax.random.key(0))
    assert boxed["params"]["embedding"].names == ("heads", None)


@pytest.mark.parametrize(("config", "field"), [(T5Bias(7), "buckets"), (T5Bias(2), "buckets"), (T5Bias(8, 4), "max_d")])
def test_problems(config, field):
    with pytest.raises(ConfigError, match=rf"^{field}"):
        validate(config)
