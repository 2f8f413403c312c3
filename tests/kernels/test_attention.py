"""Attention against jax.nn.dot_product_attention, numpy in float64 and laws; float32, so tolerances are a few ulps."""

import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, dispatch
from pallas_kernels.attention import Mask
from pallas_kernels.attention.tiled import Config
from tests.evidence import evidence
from tests.kernels.oracle import attend, visible

TOLERANCE = 2e-6  # float32 rounding of sums over at most 70 keys of size about 1
FORMS = {
    "reference": {"implementation": "reference"},
    "xla": {"implementation": "xla"},
    "tiled": {"implementation": "xla", "config": Config(4, 5)},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


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
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def both(f, *arrays):
    """Output and gradients."""
    return together(f)(*arrays)


def together(f):
    """Output and gradients of any number of arrays, compiled together."""

    def run(*arrays):
        loss = lambda *arrays: (lambda out: (jnp.sum(jnp.sin(out)), out))(f(*arrays))
        (_, out), grads = jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays)
        return out, *grads

    return jax.jit(run)


@functools.cache
def theirs(length, options=()):
    """`jax.nn`'s output and gradients on `inputs(length)`."""
    return both(functools.partial(jax.nn.dot_product_attention, **dict(options)), *inputs(length))


@evidence("A01", oracle="jax.nn.dot_product_attention, output and gradients", code="pallas_kernels.attention")
@evidence("A03", oracle="jax.nn.dot_product_attention, output and gradients", code="pallas_kernels.attention")
@evidence("A08", oracle="jax.nn.dot_product_attention, output and gradients", code="pallas_kernels.attention")
@evidence("C02", oracle="jax.nn.dot_product_attention, output and gradients", code="pallas_kernels.attention.tiled")
@pytest.mark.parametrize("form", ["reference", "xla", "tiled"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "local_window_size": (3, 0)}, {"local_window_size": (2, 1)}],
    ids=["full", "causal", "causal_window", "window"],
)
def test_agrees_with_jax(form, options, evidence):
    length = 70 if form == "xla" else 13  # which is more than one of its blocks
    ours = both(functools.partial(attention, **FORMS[form], **options), *inputs(length))
    expected = theirs(length, tuple(options.items()))
    evidence.record(worst(ours[0], expected[0]), TOLERANCE)
    evidence.record(max(map(worst, ours, expected)), 5e-6)  # gradients sum over up to 70 queries and 2 heads as well


@evidence("A01", oracle="jax.nn.dot_product_attention with bias and mask", code="pallas_kernels.attention")
@pytest.mark.parametrize("form", ["reference", "xla", "tiled"])
@pytest.mark.parametrize("shape", [(2, 4, 12, 12), (1, 4, 1, 12), (2, 1, 12, 1)], ids=str)
def test_bias_and_mask_agree_with_jax(form, shape, evidence):
    q, k, v = inputs()
    bias = jax.random.normal(jax.random.key(3), shape)
    mask = jax.random.bernoulli(jax.random.key(4), 0.7, (2, 1, 12, 12)) | jnp.eye(12, dtype=bool)
    ours = both(functools.partial(attention, mask=mask, **FORMS[form]), q, k, v, bias)
    expected = both(functools.partial(jax.nn.dot_product_attention, mask=mask), q, k, v, bias)
    evidence.record(worst(ours[0], expected[0]), TOLERANCE)
    evidence.record(max(map(worst, ours, expected)), 1e-5)  # a bias that is broadcast sums over 24 rows


@evidence("A06", oracle="each document attended alone in numpy float64", code="pallas_kernels.attention")
@pytest.mark.parametrize("form", ["reference", "xla", "tiled"])
def test_packed_equals_separate(form, evidence):
    q, k, v = inputs()
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [2] * 3])
    ours = jax.jit(functools.partial(attention, is_causal=True, segment_ids=segments, **FORMS[form]))(q, k, v)
    errors = []
    for row, cut in ((0, 5), (1, 9)):
        for part in (slice(None, cut), slice(cut, None)):
            alone = [np.asarray(x)[row : row + 1, part] for x in (q, k, v)]
            causal = np.tril(np.ones((1, *alone[0].shape[1:2] * 2), bool))
            errors.append(worst(ours[row : row + 1, part], attend(*alone, seen=causal)[0]))
    evidence.record(max(errors), TOLERANCE)


@evidence("C16", oracle="column sums of numpy's float64 softmax", code="pallas_kernels.attention.tiled")
@pytest.mark.parametrize("form", ["reference", "xla", "tiled"])
def test_residual_and_column_sums(form, evidence):
    q, k, v = inputs(length=9, key_length=11)
    sinks, counts = jnp.asarray([0.5, -1.0, 2.0, 0.0]), jnp.asarray([7, 11])
    run = functools.partial(
        attention, logits_soft_cap=3.0, return_residual=True, return_column_sums=True, **FORMS[form]
    )
    out, lse, sums = jax.jit(run)(q, k, v, key_value_seq_lengths=counts, sinks=sinks)
    seen = visible(2, (9, 11), counts=(None, counts))
    expected = attend(q, k, v, None, seen, sinks, cap=3.0)
    for got, wanted in ((out, expected[0]), (lse, expected[1]), (sums, expected[2].sum(2))):
        evidence.record(worst(got, wanted), 3e-6)  # a column sums nine weights


@forms
def test_lengths_agree_with_jax(form):
    q, k, v = inputs(length=9, key_length=11)
    counts = {"query_seq_lengths": jnp.asarray([4, 9]), "key_value_seq_lengths": jnp.asarray([11, 6])}
    ours = attention(q, k, v, **counts, **form)
    theirs = jax.nn.dot_product_attention(q, k, v, **counts)
    assert worst(ours[0, :4], theirs[0, :4]) < TOLERANCE
    assert worst(ours[1], theirs[1]) < TOLERANCE
    np.testing.assert_array_equal(ours[0, 4:], 0.0)


@forms
def test_what_lies_beyond_a_length_is_never_seen(form):
    q, k, v = inputs(length=8)
    counts = {"query_seq_lengths": jnp.asarray([5, 8]), "key_value_seq_lengths": jnp.asarray([5, 0])}
    run = together(functools.partial(attention, is_causal=True, **counts, **form))
    chex.assert_trees_all_equal(run(*(x.at[0, 5:].set(jnp.nan) for x in (q, k, v))), run(q, k, v))


@forms
def test_query_without_keys_gives_zero_and_finite_gradients(form):
    q, k, v = inputs(length=4)
    positions = (jnp.asarray([[0, 1, 2, 3], [-1, -1, 0, 1]]),) * 2

    @jax.jit
    def run(q, k, v):
        options = {"is_causal": True, "positions": positions, "return_residual": True, **form}
        (out, lse), pull = jax.vjp(functools.partial(attention, **options), q, k, v)
        return out, lse, pull((out, jnp.ones_like(lse)))

    out, lse, grads = run(q, k, v)
    np.testing.assert_array_equal(jnp.isneginf(lse)[1, :, 0], [True, True, False, False])
    np.testing.assert_array_equal(out[1, :2], 0.0)
    for gradient in grads:
        chex.assert_tree_all_finite(gradient)
        np.testing.assert_array_equal(gradient[1, :2], 0.0)


@forms
def test_gradient_of_the_residual(form):
    """d lse_i / d q_i = scale sum_j P_ij k_j: attention that has the keys for values."""
    q, k, v = inputs(kv_heads=4)
    options = {"is_causal": True, "scale": 0.3}
    residual = lambda q: jnp.sum(attention(q, k, v, return_residual=True, **options, **form)[1])
    got = jax.jit(jax.grad(residual))(q)
    assert worst(got, 0.3 * jax.nn.dot_product_attention(q, k, k, **options)) < TOLERANCE


@forms
def test_a_sink_is_a_key_without_value(form):
    """One more key of score `sink` (queries have a feature 1 that only this key has) and value 0."""
    q, k, v = inputs(heads=2, kv_heads=1)
    sink = 0.7
    q1 = jnp.concatenate([q, jnp.ones((*q.shape[:3], 1))], axis=3)
    grown = jnp.concatenate([jnp.zeros((2, 1, 1, 8)), k], axis=1)
    mark = jnp.zeros((2, 13, 1, 1)).at[:, 0].set(sink)
    theirs = jax.nn.dot_product_attention(
        q1, jnp.concatenate([grown, mark], axis=3), jnp.pad(v, ((0, 0), (1, 0), (0, 0), (0, 1))), scale=1.0
    )[..., :8]
    assert worst(attention(q, k, v, sinks=jnp.full(2, sink), scale=1.0, **form), theirs) < TOLERANCE


def test_a_mask_joins_what_it_describes():
    q, k, v = inputs()
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 12])
    dense = jax.random.bernoulli(jax.random.key(4), 0.8, (12, 12)) | jnp.eye(12, dtype=bool)
    mask = Mask(is_causal=True, local_window_size=(6, None)) & Mask(segment_ids=segments) & Mask(dense=dense)
    ours = jax.jit(lambda q, k, v, mask: attention(q, k, v, mask=mask, local_window_size=(4, 2)))(q, k, v, mask)
    seen = visible(2, (12, 12), True, (4, None), segments=(np.asarray(segments),) * 2) & np.asarray(dense)
    assert worst(ours, attend(q, k, v, None, seen)[0]) < TOLERANCE
    with pytest.raises(ValueError, match="segment_ids is given twice"):
        attention(q, k, v, mask=mask, segment_ids=segments)


@pytest.mark.parametrize("lengths", [(2048, 8192), (4096, 65536)], ids=["quick", "far"])
def test_memory_grows_linearly_in_length(lengths):
    """Temporary bytes of forward and backward: a dense implementation would grow with the square."""

    def step(q, k, v):
        return jax.grad(lambda q: jnp.sum(attention(q, k, v, is_causal=True, implementation="xla")))(q)

    def bytes_at(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        return jax.jit(step).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at(lengths[1]) < 1.1 * lengths[1] / lengths[0] * bytes_at(lengths[0])


def same_precision(query, key, value, sinks):
    """Plain causal attention as XLA does it in one dtype: scores and their softmax in at least float32."""
    length, head_dim = query.shape[1], query.shape[3]
    scores = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=sinks.dtype) / head_dim**0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    none = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, none], -1), -1)[..., :-1].astype(value.dtype)
    return jnp.einsum("bnts,bsnd->btnd", weights, value)


@pytest.mark.parametrize("config", [None, Config(16, 16)], ids=["one block", "blocks"])
def test_bfloat16_errs_no_more_than_plain_attention(config):
    """Root mean square errors of the output and of every gradient, sinks' too: at most 1.3 times those of plain XLA.

    Pooled over seeds, because the gradient of sinks is four numbers each time.
    """
    ours = together(functools.partial(sunk, is_causal=True, implementation="xla", config=config))
    plain = together(same_precision)
    squares = []
    for seed in range(32):
        rng = np.random.default_rng(seed)
        arrays = [jnp.asarray(rng.standard_normal((1, 64, 4, 32)), jnp.bfloat16) for _ in range(3)]
        sinks = rng.standard_normal(4)
        with jax.enable_x64(True):
            exact = [np.asarray(x) for x in plain(*(np.asarray(x, np.float64) for x in arrays), sinks)]
        found = [f(*arrays, jnp.asarray(sinks, jnp.float32)) for f in (ours, plain)]
        squares.append([[np.mean((np.asarray(a, np.float64) - b) ** 2) for a, b in zip(f, exact)] for f in found])
    mine, its = np.sqrt(np.mean(squares, axis=0))
    assert its.all()
    assert (mine <= 1.3 * its).all(), mine / its


def sunk(query, key, value, sinks, **options):
    """Attention whose sinks are its fourth argument."""
    return attention(query, key, value, sinks=sinks, **options)


def test_causal_jacobian_is_lower_triangular():
    q, k, v = inputs(length=6, batch=1)
    jacobian = jax.jit(jax.jacobian(lambda v: attention(q, k, v, is_causal=True).sum((0, 2, 3))))(v)
    reach = jnp.abs(jacobian).sum((1, 3, 4))
    np.testing.assert_array_equal(np.asarray(reach) != 0, np.tril(np.ones((6, 6), bool)))


@forms
def test_a_nan_stays_in_its_row(form):
    q, k, v = inputs()
    results = both(functools.partial(attention, is_causal=True, **form), q, k.at[0].set(jnp.nan), v)
    chex.assert_tree_all_finite([x[1] for x in results])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 12, 3, 8), "v": (2, 12, 3, 8)}, r"query has shape \(2, 12, 4, 8\), key \(2, 12, 3, 8\)"),
        ({"v": (2, 11, 2, 8)}, r"key has shape \(2, 12, 2, 8\), value \(2, 11, 2, 8\)"),
        ({"segments": (2, 11)}, r"segment_ids .* \(2, 11\), query has \(2, 12, 4, 8\)"),
        ({"q": (2, 12, 32)}, r"query has shape \(2, 12, 32\)"),
        ({"bias": (2, 3, 12, 12)}, r"bias has shape \(2, 3, 12, 12\), query \(2, 12, 4, 8\), key \(2, 12, 2, 8\)"),
        ({"q": (2, 6, 4, 8), "segments": None, "window": 3}, r"query has shape \(2, 6, 4, 8\), key \(2, 12, 2, 8\)"),
        ({"segments": None, "lengths": [3]}, r"key_value_seq_lengths have shape \(1,\) .* key has \(2, 12, 2, 8\)"),
        ({"segments": None, "lengths": [3, -1]}, r"key_value_seq_lengths=\[ 3 -1\] must not be negative"),
        ({"window": (-1, 0)}, r"local_window_size=\(-1, 0\) must be .* none negative"),
        ({"sinks": (3,)}, r"sinks have shape \(3,\), query \(2, 12, 4, 8\)"),
        ({"dtype": "int32"}, "query has dtype int32; expected a floating dtype"),
        ({"cap": 0.0}, "logits_soft_cap=0.0 must be positive"),
    ],
)
def test_arguments_that_disagree_are_named(change, message):
    shapes = {"q": (2, 12, 4, 8), "k": (2, 12, 2, 8), "v": (2, 12, 2, 8), "segments": (2, 12), **change}
    zeros = {name: None if shapes.get(name) is None else jnp.zeros(shapes[name]) for name in (*"qkv", "bias", "sinks")}
    q, k, v = (zeros[name].astype(change.get("dtype", "float32")) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        attention(
            *(q, k, v, zeros["bias"]),
            segment_ids=None if shapes["segments"] is None else jnp.zeros(shapes["segments"], jnp.int32),
            local_window_size=change.get("window"),
            key_value_seq_lengths=None if "lengths" not in change else jnp.asarray(change["lengths"]),
            sinks=zeros["sinks"],
            logits_soft_cap=change.get("cap"),
        )


def test_explicit_implementation_never_falls_back():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match='attention "tpu" does not run on cpu'):
        attention(q, k, v, implementation="tpu")
    with pytest.raises(NotImplementedError, match='"reference" has no block sizes'):
        attention(q, k, v, implementation="reference", config=Config())
    with pytest.raises(ValueError, match="'fast' is unknown: use one of cudnn, hopper, reference, tpu, xla"):
        attention(q, k, v, implementation="fast")


def test_a_sequence_of_names_is_an_order_of_preference():
    q, k, v = inputs()
    first = attention(q, k, v, implementation=("tpu", "reference"))
    np.testing.assert_array_equal(first, attention(q, k, v, implementation="reference"))
    with pytest.raises(NotImplementedError, match='"tpu" does not run on cpu; attention "hopper" does not run on cpu'):
        attention(q, k, v, implementation=("tpu", "hopper"))


def test_the_choice_is_logged_once(caplog):
    dispatch.announce.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        attention(*inputs())
        attention(*inputs())
    [record] = caplog.records
    assert record.getMessage().startswith('attention "xla" on cpu; attention "tpu" does not run on cpu')
