"""Linear attention against the matrix it stands for, in numpy float64; the Performer against softmax attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.features import EluPlusOne, Hyperbolic, Identity, Positive, Trigonometric
from llmjax.nn.linear_attention import LinearAttention, linear_attention
from llmjax.nn.mixer import Context
from llmjax.nn.retention import retention
from llmjax.nn.rope import Rope, rotate
from pallas_kernels.gated_linear_attention import gated_linear_attention, semiseparable_matrix
from tests.evidence import evidence
from tests.mixers.cases import D_MODEL, INIT, apply, params_of

FORMS = ["chunked", "recurrent", "quadratic"]
BATCH, LENGTH, HEADS, DIM = 2, 20, 2, 6
SEGMENTS = np.int32([[0] * 7 + [1] * 9 + [-1] * 4, [-1] * 2 + [0] * 11 + [2] * 7])
ROUNDING = 1e-5
"""Float32 sums of 20 terms, divided by one of them that is not small."""


@functools.cache
def arrays():
    random = np.random.default_rng(0)
    return [random.standard_normal((BATCH, LENGTH, HEADS, DIM)).astype(np.float32) for _ in range(3)]


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def seen(segments, causal):
    """Which pairs of tokens see each other."""
    same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
    return same & np.tri(segments.shape[1], dtype=bool) if causal else same


def dense(query, key, value, mask, normalised=True):
    """(mask * Q K^T) V, rows divided by their sum, float64."""
    query, key, value = (np.float64(x) for x in (query, key, value))
    weights = np.einsum("bihf,bjhf->bhij", query, key) * mask[:, None]
    if normalised:
        total = weights.sum(-1, keepdims=True)
        weights = weights / np.where(total == 0, 1, total)
    return np.einsum("bhij,bjhd->bihd", weights, value)


@functools.partial(jax.jit, static_argnames=("causal", "normalised", "form"))
def ours(query, key, value, segments, causal, normalised, form):
    phi = EluPlusOne().features
    rules = dict(causal=causal, normalised=normalised, form=form)
    return linear_attention(phi(query), phi(key), value, segments, **rules)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("causal", "normalised"), [(True, True), (False, True), (True, False)])
@evidence("B01", oracle="masked phi(Q) phi(K)^T V in numpy float64", code="llmjax.nn.linear_attention")
def test_every_form_is_the_masked_matrix(causal, normalised, form, evidence):
    """Packed documents and padding on both sides; the three forms are compared with one matrix."""
    query, key, value = arrays()
    out = ours(query, key, value, SEGMENTS, causal, normalised, form)
    phi = (elu_plus_one(np.float64(query)), elu_plus_one(np.float64(key)))
    expected = dense(*phi, value, seen(SEGMENTS, causal), normalised)
    evidence.record(np.abs(out - expected).max() / np.abs(expected).max(), ROUNDING)


@evidence("B01", oracle="weights that sum to one return a constant", code="llmjax.nn.linear_attention")
def test_constant_values_are_returned(evidence):
    query, key, _ = arrays()
    out = np.asarray(ours(query, key, np.full_like(key, 3.5), SEGMENTS, True, True, "chunked"))
    present = SEGMENTS >= 0
    evidence.record(np.abs(out[present] - 3.5).max(), 5e-6)  # a quotient of two equal sums of 20 terms
    assert (out[~present] == 0).all()


@pytest.mark.parametrize("rope", [None, Rope()])
@evidence("B01", oracle="numpy float64, the layer written out", code="llmjax.nn.linear_attention.LinearAttention")
def test_layer(rope, evidence):
    """Rotary positions count from each document's beginning, and turn queries and keys before the map."""
    mixer, positions = LinearAttention(heads=2, rope=rope), np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    params, x = params_of(mixer), np.random.default_rng(1).standard_normal((BATCH, LENGTH, D_MODEL)).astype(np.float32)
    out = jax.jit(functools.partial(apply, mixer))(params, x, positions, SEGMENTS)
    wide = {name: np.float64(leaf["kernel"]) for name, leaf in params.items()}
    q, k, v = (np.einsum("bld,dhe->blhe", x, wide[name]) for name in ("query", "key", "value"))
    if rope is not None:
        q, k = (np.asarray(rotate(jnp.float32(x), positions, rope)) for x in (q, k))
    z = dense(elu_plus_one(q), elu_plus_one(k), v, seen(SEGMENTS, True))
    expected = np.einsum("blhe,hed->bld", z, wide["out"])
    evidence.record(np.abs(out - expected).max() / np.abs(expected).max(), ROUNDING)


@evidence("B03", oracle="masked phi(Q) phi(K)^T V in numpy float64", code="llmjax.nn.linear_attention")
def test_causal_favor_is_a_prefix_sum(evidence):
    query, key, value = arrays()
    features = [np.asarray(jax.jit(Hyperbolic(count=8).features)(x)) for x in (query, key)]
    out, _ = jax.jit(linear_attention)(*features, value, SEGMENTS)
    expected = dense(*features, value, seen(SEGMENTS, True))
    evidence.record(np.abs(out - expected).max() / np.abs(expected).max(), ROUNDING)


@evidence("B03", oracle="softmax attention in numpy float64", code="llmjax.nn.linear_attention")
def test_the_performer_approaches_softmax_attention(evidence):
    """The root mean squared error over 64 draws of m directions falls like 1 / sqrt(m), m from 16 to 256.

    Vectors are short, so that few directions are enough. 64 draws tell an error to about 5 %, the exponent to 0.03.
    """
    query, key, value = arrays()
    query, key = (0.8 * x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    logits = np.einsum("bihd,bjhd->bhij", np.float64(query), np.float64(key)) / np.sqrt(DIM)
    weights = np.where(np.tri(LENGTH, dtype=bool), np.exp(logits), 0)
    expected = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), value)
    phi = jax.jit(Positive(count=64 * 256, orthogonal=False).features)
    draws = [np.moveaxis(np.asarray(phi(x)).reshape(*x.shape[:3], 64, 256), 3, 0) for x in (query, key)]
    sizes, errors = [16, 64, 256], []
    attend = jax.jit(jax.vmap(lambda q, k: linear_attention(q, k, value, form="quadratic")[0]))
    for m in sizes:
        out = attend(*(x[..., :m] for x in draws))
        errors.append(np.sqrt(np.mean((np.asarray(out) - expected) ** 2)))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    evidence.record(abs(slope + 0.5), 0.1)


@evidence("B02", oracle="weights of a mean of positive kernels", code="llmjax.nn.linear_attention")
def test_only_positive_features_keep_sums_of_weights_positive(evidence):
    """Sums of trigonometric products go negative (the known weakness of B02); those of positive features do not."""
    query, key, _ = (3 * x for x in arrays())
    sums = {}
    for config in (Trigonometric(count=8), Positive(count=8)):
        q, k = (np.asarray(jax.jit(config.features)(x), np.float64) for x in (query, key))
        sums[type(config)] = np.cumsum(k, axis=1) * q
    assert (sums[Trigonometric].sum(-1) < 0).any()
    evidence.record(-min(sums[Positive].sum(-1).min(), 0), 0)


def fading(query, key, value, log_decay):
    """(L * Q K^T) V, L_ij the product of the decays after j up to i, token by token of the same document."""
    query, key, value, log_decay = (np.float64(x) for x in (query, key, value, log_decay))
    out = np.zeros_like(value)
    for b, i, h in np.ndindex(value.shape[:3]):
        for j in range(i + 1):
            if SEGMENTS[b, i] == SEGMENTS[b, j] >= 0:
                decay = np.exp(log_decay[b, j + 1 : i + 1, h].sum())
                out[b, i, h] += decay * (query[b, i, h] @ key[b, j, h]) * value[b, j, h]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", [1.0, 0.9])
@evidence("B13", oracle="(L * Q K^T) V in numpy float64, L_ij = a^(i-j)", code="llmjax.nn.retention")
def test_constant_masks(decay, form, evidence):
    """A constant a below 1 is RetNet's mask, a = 1 causal linear attention without a normaliser."""
    query, key, value = arrays()
    log_decay = np.float32([np.log(decay)] * HEADS)
    out = np.asarray(jax.jit(functools.partial(retention, form=form))(query, key, value, log_decay, SEGMENTS)[0])
    expected = fading(query / np.sqrt(DIM), key, value, np.broadcast_to(log_decay, value.shape[:3]))
    evidence.record(np.abs(out - expected).max() / np.abs(expected).max(), ROUNDING)
    if decay == 1:
        plain = ours_unnormalised(query / np.sqrt(np.float32(DIM)), key, value, form)
        evidence.record(np.abs(out - plain).max() / np.abs(expected).max(), ROUNDING)


@functools.partial(jax.jit, static_argnames="form")
def ours_unnormalised(query, key, value, form):
    return linear_attention(query, key, value, SEGMENTS, normalised=False, form=form)[0]


@evidence("B13", oracle="(L * Q K^T) V in numpy float64, loops", code="pallas_kernels.gated_linear_attention")
def test_masks_that_tokens_choose(evidence):
    """The 1-semiseparable mask of any decays, as recurrence and as matrix."""
    query, key, value = arrays()
    log_decay = -np.abs(np.random.default_rng(5).standard_normal((BATCH, LENGTH, HEADS))).astype(np.float32)
    expected = fading(query, key, value, log_decay)
    out, _ = jax.jit(gated_linear_attention)(query, key, value, log_decay, segment_ids=SEGMENTS)
    evidence.record(np.abs(out - expected).max() / np.abs(expected).max(), ROUNDING)
    matrix = np.asarray(jax.jit(semiseparable_matrix)(log_decay, key, query))
    masked = np.einsum("bhij,bjhd->bihd", matrix * seen(SEGMENTS, True)[:, None], value)
    evidence.record(np.abs(masked - expected).max() / np.abs(expected).max(), ROUNDING)


def test_a_state_cannot_hold_the_future():
    mixer = LinearAttention(heads=2, causal=False)
    context = Context(jnp.zeros((1, 1), jnp.int32))
    state = mixer.init_state(D_MODEL, 1, 8, jnp.float32)
    with pytest.raises(NotImplementedError, match="later tokens"):
        mixer.build(D_MODEL, 1, INIT).apply({"params": params_of(mixer)}, jnp.zeros((1, 1, D_MODEL)), context, state)


@pytest.mark.parametrize(
    ("mixer", "d_model", "field"),
    [
        (LinearAttention(features=Identity()), 16, "normalised"),
        (LinearAttention(features=Positive(count=0)), 16, "count"),
        (LinearAttention(heads=3), 16, "heads"),
        (LinearAttention(heads=16, rope=Rope()), 16, "rope.fraction"),
    ],
)
def test_configs_that_cannot_be(mixer, d_model, field):
    nodes = [mixer.problems(), mixer.features.problems() if hasattr(mixer.features, "problems") else []]
    found = [name for problems in (*nodes, mixer.problems_at(d_model)) for name, _ in problems]
    assert field in found
