"""Entropy and KL of linear heads against dense float64 and against the laws that they obey."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.test_util import check_grads

from pallas_kernels import linear_entropy, linear_kl
from tests.evidence import evidence

TOKENS, VOCAB = 13, 37


def inputs(dtype=jnp.float32):
    """Two heads of different widths over one vocabulary, and weights of which one is 0."""
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (TOKENS, 8), dtype),
        jax.random.normal(keys[1], (8, VOCAB), dtype),
        jax.random.normal(keys[2], (TOKENS, 6), dtype),
        jax.random.normal(keys[3], (6, VOCAB), dtype),
        jax.random.uniform(keys[4], (TOKENS,), dtype).at[3].set(0.0),
    )


def head(logits):
    """A head whose logits are these: the identity, and the logits as its kernel."""
    logits = jnp.asarray(logits, jnp.float32)
    return jnp.eye(logits.shape[0]), logits


def capped(logits, cap):
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def dense_entropy(h, w, weights, cap=None):
    log_p = jax.nn.log_softmax(capped(h @ w, cap))
    return -jnp.sum(weights * jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def dense_kl(hp, wp, hq, wq, weights, cap_p=None, cap_q=None):
    log_p, log_q = jax.nn.log_softmax(capped(hp @ wp, cap_p)), jax.nn.log_softmax(capped(hq @ wq, cap_q))
    return jnp.sum(weights * optax.losses.kl_divergence_with_log_targets(log_q, log_p))


def worst(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b)))) for a, b in pairs)


@evidence("C13", oracle="dense float64 entropy, value and gradient", code="pallas_kernels.cross_entropy")
@pytest.mark.parametrize(("chunk", "cap"), [(None, None), (4, None), (5, 2.0), (64, None)])
def test_entropy(chunk, cap, evidence):
    h, w, _, _, weights = inputs()

    def ours(h, w, weights):
        return linear_entropy(h, w, weights, chunk=chunk, soft_cap=cap)[0]

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(h, w, weights)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (h, w, weights)]
        expected = jax.value_and_grad(dense_entropy, argnums=(0, 1, 2))(*wide, cap)
        expected = jax.tree.map(np.asarray, expected)
    evidence.record(worst(got, expected), 2e-5)


@evidence("C13", oracle="dense float64 KL (optax), value and gradient", code="pallas_kernels.cross_entropy")
@pytest.mark.parametrize(
    ("chunk", "caps"), [(None, (None, None)), (4, (None, None)), (5, (2.0, 3.0)), (6, (None, 2.0))]
)
def test_kl(chunk, caps, evidence):
    arguments = inputs()
    every = tuple(range(5))

    def ours(*arguments):
        return linear_kl(*arguments, chunk=chunk, soft_cap_p=caps[0], soft_cap_q=caps[1])[0]

    got = jax.jit(jax.value_and_grad(ours, argnums=every))(*arguments)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
        expected = jax.tree.map(np.asarray, jax.value_and_grad(dense_kl, argnums=every)(*wide, *caps))
    evidence.record(worst(got, expected), 2e-5)


@evidence("C13", oracle="scipy.special.entr and rel_entr, token by token", code="pallas_kernels.cross_entropy")
def test_every_token(evidence):
    hp, wp, hq, wq, weights = inputs()
    p, q = (scipy.special.softmax(np.asarray(h, np.float64) @ np.asarray(w), axis=-1) for h, w in ((hp, wp), (hq, wq)))
    entropy, divergence = linear_entropy(hp, wp, weights, chunk=4)[1], linear_kl(hp, wp, hq, wq, weights, chunk=4)[1]
    reverse = linear_kl(hq, wq, hp, wp, weights, chunk=4)[1]
    expected = scipy.special.entr(p).sum(-1), scipy.special.rel_entr(p, q).sum(-1), scipy.special.rel_entr(q, p).sum(-1)
    evidence.record(worst((entropy, divergence, reverse), expected), 1e-5)


@evidence("C13", oracle="entropy of the uniform distribution is ln V", code="pallas_kernels.cross_entropy")
def test_uniform_entropy_is_log_vocab(evidence):
    """At the maximum of the entropy its gradient is 0."""
    h, _, _, _, weights = inputs()
    total, entropy = linear_entropy(h, jnp.zeros((8, VOCAB)), weights, chunk=4)
    evidence.record(np.max(np.abs(entropy - np.log(VOCAB))), 2e-6)
    np.testing.assert_allclose(total, np.sum(weights) * np.log(VOCAB), rtol=2e-6)
    grad = jax.grad(lambda w: linear_entropy(h, w, weights, chunk=4)[0])(jnp.zeros((8, VOCAB)))
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_kl_is_zero_only_for_equal_heads():
    hp, wp, hq, wq, weights = inputs()
    np.testing.assert_array_equal(linear_kl(hp, wp, hp, wp, weights, chunk=4)[1], 0)
    assert np.all(linear_kl(hp, wp, hq, wq, weights, chunk=4)[1] > 0)
    shifted = linear_kl(hp, wp, jnp.c_[hp, jnp.ones(TOKENS)], jnp.r_[wp, jnp.full((1, VOCAB), 4.0)], weights)[1]
    np.testing.assert_allclose(shifted, 0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
def test_kl_of_nearly_equal_heads_keeps_its_digits(scale):
    """Logits up to 50: rounding their log-sum-exps alone would cost 50 * 6e-8 = 3e-6 a token."""
    keys = jax.random.split(jax.random.key(2), 2)
    p = 10 * jax.random.normal(keys[0], (8, 999))
    q = p + scale * jax.random.normal(keys[1], (8, 999))
    got = linear_kl(*head(p), *head(q), jnp.ones(8))[1]
    p, q = (scipy.special.softmax(np.asarray(x, np.float64), axis=-1) for x in (p, q))
    np.testing.assert_allclose(got, scipy.special.rel_entr(p, q).sum(-1), atol=2e-7, rtol=1e-3 if scale < 0.1 else 1e-5)
    assert np.all(got >= -2e-7)


@evidence("C13", oracle="worked example: five logits at temperature 3", code="pallas_kernels.cross_entropy")
def test_distillation_example(evidence):
    """Teacher and student of five logits: H(p), KL and reverse KL to seven digits, computed in float64 beforehand."""
    teacher, student = ([[8.3, 7.1, 5.2, 4.8, 2.1]], [[7.9, 6.8, 5.0, 4.5, 2.0]])
    (hp, wp), (hq, wq) = head(teacher), head(student)
    one = jnp.ones(1)
    got = (
        linear_entropy(hp / 3, wp, one)[0],
        linear_kl(hp / 3, wp, hq / 3, wq, one)[0],
        linear_kl(hq / 3, wq, hp / 3, wp, one)[0],
    )
    evidence.record(worst(got, (1.413490, 4.08961e-4, 4.12054e-4)), 1e-6)
    grad = jax.grad(lambda wq: linear_kl(hp / 100, wp, hq / 100, wq, one * 100**2)[0])(wq)
    limit = (np.array(student) - np.array(teacher)) / 5
    np.testing.assert_allclose(grad, limit - limit.mean(), atol=1e-3)


def test_finite_differences_in_float64():
    with jax.enable_x64(True):
        hp, wp, hq, wq, weights = inputs(jnp.float64)
        tolerance = {"order": 1, "modes": ["rev"], "atol": 1e-7, "rtol": 1e-7}
        entropy = jax.jit(lambda *a: linear_entropy(*a, chunk=5, soft_cap=2.0)[0])
        kl = jax.jit(lambda *a: linear_kl(*a, chunk=5, soft_cap_p=2.0, soft_cap_q=3.0)[0])
        check_grads(entropy, (hp, wp, weights), **tolerance)
        check_grads(kl, (hp, wp, hq, wq, weights), **tolerance)


def test_a_frozen_teacher_costs_one_product():
    """Two products make the two heads' logits, two the student's gradients; none is left for the teacher's."""

    def loss(hp, wp, hq, wq):
        hp, wp = jax.lax.stop_gradient((hp, wp))
        return linear_kl(hp, wp, hq, wq, jnp.ones(512), chunk=64)[0]

    shapes = ((512, 128), (128, 1024), (512, 96), (96, 1024))
    step = jax.jit(jax.grad(loss, argnums=(2, 3)))
    text = step.lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()
    assert text.count(" dot(") == 4


@pytest.mark.parametrize("heads", [1, 2])
def test_memory_is_that_of_a_chunk(heads):
    """Compiled, not run: 16k tokens, 128k vocabulary, width 1024. A head needs the logits and probabilities of a chunk
    and the float32 gradients of its kernel and hidden states; all logits would be four times as many bytes."""
    tokens, width, vocab, chunk = 16384, 1024, 131072, 1024

    def loss(h, w, h2, w2):
        if heads == 2:
            return linear_kl(h, w, h2, w2, jnp.ones(tokens), chunk=chunk)[0]
        return linear_entropy(h, w, jnp.ones(tokens), chunk=chunk)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in 2 * [(tokens, width), (width, vocab)]]
    step = jax.jit(jax.grad(loss, argnums=tuple(range(2 * heads))))
    temporary = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    needed = 4 * heads * (2 * chunk * vocab + width * vocab + 3 * tokens * width)
    assert temporary <= needed
    assert needed < 0.25 * 4 * heads * tokens * vocab


def test_bad_arguments_are_named():
    hp, wp, hq, wq, weights = inputs()
    with pytest.raises(ValueError, match=r"weights \(12,\) must be \[13\]"):
        linear_entropy(hp, wp, weights[1:])
    with pytest.raises(ValueError, match="must have the same tokens and the same vocabulary"):
        linear_kl(hp, wp, hq[1:], wq, weights)
    with pytest.raises(ValueError, match="must have the same tokens and the same vocabulary"):
        linear_kl(hp, wp, hq, wq[:, 1:], weights)
    with pytest.raises(ValueError, match=r"hidden has shape \(13, 6\), kernel \(8, 37\)"):
        linear_kl(hp, wp, hq, wp, weights)
