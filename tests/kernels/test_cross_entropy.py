"""Linear cross-entropy against optax on dense logits and against float64; float32 rounding of 37-term sums."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from pallas_kernels import linear_cross_entropy, linear_token_losses
from tests.evidence import evidence

TOKENS, WIDTH, VOCAB = 13, 8, 37


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (TOKENS, WIDTH), dtype),
        jax.random.normal(keys[1], (WIDTH, VOCAB), dtype),
        jax.random.randint(keys[2], (TOKENS,), 0, VOCAB),
        jax.random.uniform(keys[3], (TOKENS,), dtype).at[3].set(0.0),
    )


def dense_logits(hidden, kernel, soft_cap):
    logits = hidden @ kernel
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def dense(hidden, kernel, targets, weights, z_loss=0.0, soft_cap=None, smoothing=0.0):
    logits = dense_logits(hidden, kernel, soft_cap)
    labels = optax.smooth_labels(jax.nn.one_hot(targets, kernel.shape[1]), smoothing)
    nll = optax.softmax_cross_entropy(logits, labels)
    return jnp.sum(weights * (nll + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2))


def worst(got, expected):
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(got, expected, strict=True))


class TestAgainstOptax(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_value_and_gradients(self):
        for chunk, z_loss, soft_cap in ((None, 0.0, None), (4, 1e-2, None), (5, 1e-2, 3.0), (64, 0.0, None)):
            h, w, targets, weights = inputs()

            def ours(h, w, chunk=chunk, z_loss=z_loss, soft_cap=soft_cap, targets=targets, weights=weights):
                return linear_cross_entropy(h, w, targets, weights, chunk=chunk, z_loss=z_loss, soft_cap=soft_cap)[0]

            def theirs(h, w, z_loss=z_loss, soft_cap=soft_cap, targets=targets, weights=weights):
                return dense(h, w, targets, weights, z_loss, soft_cap)

            got = self.variant(jax.value_and_grad(ours, argnums=(0, 1)))(h, w)
            expected = jax.value_and_grad(theirs, argnums=(0, 1))(h, w)
            chex.assert_trees_all_close(got, expected, atol=2e-5, rtol=2e-5)
            chex.assert_trees_all_close(ours(h, w), expected[0], rtol=2e-6)


@evidence("C12", oracle="optax dense cross-entropy, value and gradient", code="pallas_kernels.cross_entropy")
@pytest.mark.parametrize("chunk", [1, 4, 13, 20])
def test_chunk_size_changes_nothing(chunk, evidence):
    h, w, targets, weights = inputs()

    def ours(h, w):
        return 3.0 * linear_cross_entropy(h, w, targets, weights, chunk=chunk, z_loss=1e-2)[0]

    got = jax.jit(jax.grad(ours, argnums=(0, 1)))(h, w)
    expected = jax.grad(lambda h, w: 3.0 * dense(h, w, targets, weights, 1e-2), argnums=(0, 1))(h, w)
    evidence.record(worst(got, expected), 2e-5)


@evidence("C12", oracle="optax dense cross-entropy of smoothed labels", code="pallas_kernels.cross_entropy")
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_label_smoothing_and_weights(soft_cap, evidence):
    """Gradients in hidden, kernel and weights; optax spreads the smoothed mass over the whole vocabulary, as we do."""
    h, w, targets, weights = inputs()

    def ours(h, w, g):
        options = {"label_smoothing": 0.3, "z_loss": 1e-2, "soft_cap": soft_cap}
        return linear_cross_entropy(h, w, targets, g, chunk=4, **options)[0]

    def theirs(h, w, g):
        return dense(h, w, targets, g, 1e-2, soft_cap, 0.3)

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(h, w, weights)
    expected = jax.value_and_grad(theirs, argnums=(0, 1, 2))(h, w, weights)
    evidence.record(worst((got[0], *got[1]), (expected[0], *expected[1])), 2e-5)


def test_ignored_targets_weigh_nothing():
    h, w, targets, weights = inputs()
    ignored = targets.at[jnp.array([0, 5, 12])].set(-100)

    def ours(h, targets, weights, ignore_index):
        return linear_cross_entropy(h, w, targets, weights, chunk=4, ignore_index=ignore_index)[0]

    value, grad = jax.value_and_grad(ours)(h, ignored, weights, -100)
    kept = weights.at[jnp.array([0, 5, 12])].set(0.0)
    np.testing.assert_allclose(value, dense(h, w, targets, kept), rtol=2e-6)
    np.testing.assert_allclose(grad, jax.grad(dense)(h, w, targets, kept), atol=2e-5)
    assert not np.any(grad[jnp.array([0, 5, 12])])


@evidence("C12", oracle="optax dense cross-entropy, one cotangent a token", code="pallas_kernels.cross_entropy")
@pytest.mark.parametrize("chunk", [None, 4])
def test_token_losses_honour_every_cotangent(chunk, evidence):
    """A DPO-like function of the tokens' nll and lse: its gradient is no fixed weighted sum of theirs."""
    h, w, targets, weights = inputs()

    def loss(nll, lse):
        return jnp.sum(jax.nn.softplus(weights * nll)) + jnp.sum(jnp.sin(lse))

    def ours(h, w):
        terms = linear_token_losses(h, w, targets, chunk=chunk, soft_cap=3.0)
        return loss(terms.nll, terms.lse)

    def theirs(h, w):
        logits = dense_logits(h, w, 3.0)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return loss(nll, jax.nn.logsumexp(logits, axis=-1))

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(h, w)
    expected = jax.value_and_grad(theirs, argnums=(0, 1))(h, w)
    evidence.record(worst((got[0], *got[1]), (expected[0], *expected[1])), 2e-5)


def test_finite_differences_in_float64():
    with jax.enable_x64(True):
        h, w, targets, weights = inputs(jnp.float64)

        def summed(h, w, g):
            options = {"label_smoothing": 0.2, "z_loss": 1e-2, "soft_cap": 2.0}
            return linear_cross_entropy(h, w, targets, g, chunk=5, **options)[0]

        def separate(h, w):
            return linear_token_losses(h, w, targets, chunk=5, soft_cap=2.0)[:2]

        assert summed(h, w, weights).dtype == jnp.float64
        check_grads(jax.jit(summed), (h, w, weights), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
        check_grads(jax.jit(separate), (h, w), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_bfloat16_is_as_exact_as_full_logits():
    """RMS errors of the gradients against float64: at most 1.3 times those of a bfloat16 head in plain jax."""
    keys = jax.random.split(jax.random.key(1), 3)
    h = jax.random.normal(keys[0], (96, 64), jnp.bfloat16)
    w = (jax.random.normal(keys[1], (64, 300)) / 8).astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (96,), 0, 300)
    weights = jnp.full(96, 1 / 96)

    def plain(h, w):
        logits = (h @ w).astype(jnp.float32)
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    def ours(h, w):
        return linear_cross_entropy(h, w, targets, weights, chunk=32)[0]

    def gradients(loss, *arguments):
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments)

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (h, w)]
        exact = [np.asarray(g) for g in gradients(lambda h, w: dense(h, w, targets, weights), *wide)]
    for got, theirs, truth in zip(gradients(ours, h, w), gradients(plain, h, w), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        error, allowed = (np.sqrt(np.mean((np.asarray(x, np.float64) - truth) ** 2)) for x in (got, theirs))
        assert 0 < error <= 1.3 * allowed


def test_terms_are_those_of_each_token():
    h, w, targets, weights = inputs()
    for chunk in (None, 4):
        _, terms = linear_cross_entropy(h, w, targets, weights, chunk=chunk)
        alone = linear_token_losses(h, w, targets, chunk=chunk)
        logits = h @ w
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        np.testing.assert_allclose(terms.nll, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(terms.lse, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)
        np.testing.assert_array_equal(terms.correct, logits.argmax(-1) == targets)
        chex.assert_trees_all_equal(terms, alone)


def test_no_gradient_through_the_terms():
    h, w, targets, weights = inputs()
    grad = jax.grad(lambda h: jnp.sum(linear_cross_entropy(h, w, targets, weights, chunk=4)[1].nll))(h)
    np.testing.assert_array_equal(grad, 0)


def test_uniform_logits_cost_log_vocab():
    loss, _ = linear_cross_entropy(
        jnp.ones((4, WIDTH)), jnp.zeros((WIDTH, VOCAB)), jnp.arange(4), jnp.ones(4) / 4, chunk=2
    )
    np.testing.assert_allclose(loss, np.log(VOCAB), rtol=1e-6)


def compiled_step(loss, tokens, width, vocab, arguments=(0, 1)):
    shapes = [((tokens, width), jnp.float32), ((width, vocab), jnp.float32), ((tokens,), jnp.int32)]
    step = jax.jit(jax.value_and_grad(loss, argnums=arguments))
    return step.lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()


@pytest.mark.parametrize("separate", [False, True])
def test_memory_is_a_tenth_of_full_logits(separate):
    """Compiled, not run: 16k tokens, 128k vocabulary, width 1024, chunks of the default length."""
    tokens, width, vocab = 16384, 1024, 131072

    def ours(h, w, t):
        weights = jnp.full(tokens, 1 / tokens)
        if separate:
            return jnp.sum(weights * linear_token_losses(h, w, t).nll)
        return linear_cross_entropy(h, w, t, weights)[0]

    def full(h, w, t):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h @ w, t))

    got, all_logits = (
        compiled_step(loss, tokens, width, vocab).memory_analysis().temp_size_in_bytes for loss in (ours, full)
    )
    assert all_logits >= 4 * tokens * vocab
    assert got <= 0.1 * all_logits


def test_memory_grows_by_the_chunk_and_the_head_gradient_only():
    """Temporary bytes of a step at two vocabularies: their difference must not hold all logits."""
    tokens, width, chunk = 512, 32, 64

    def grown(vocab):
        def step(h, w, t):
            return linear_cross_entropy(h, w, t, jnp.ones(tokens), chunk=chunk)[0]

        return compiled_step(step, tokens, width, vocab).memory_analysis().temp_size_in_bytes

    small, large = 4096, 16384
    allowed = 4 * (large - small) * (2 * chunk + 2 * width)  # logits and their gradient of one chunk; head gradient
    assert grown(large) - grown(small) <= allowed
    assert allowed < 4 * (large - small) * tokens


@pytest.mark.parametrize(("arguments", "products"), [((0, 1), 3), ((0,), 2), ((1,), 2)])
def test_gradients_nobody_asks_for_are_not_made(arguments, products):
    """The compiled step holds one matrix product for the logits and one for each gradient that is used."""

    def step(h, w, t):
        return linear_cross_entropy(h, w, t, jnp.ones(512), chunk=64)[0]

    assert compiled_step(step, 512, 128, 1024, arguments).as_text().count(" dot(") == products


def test_bad_arguments_are_named():
    h, w, targets, weights = inputs()
    with pytest.raises(ValueError, match=r"hidden has shape \(13, 8\), kernel \(9, 37\)"):
        linear_cross_entropy(h, jnp.zeros((9, VOCAB)), targets, weights)
    with pytest.raises(ValueError, match=r"targets \(12,\) and weights \(13,\) must be \[13\]"):
        linear_cross_entropy(h, w, targets[1:], weights)
    with pytest.raises(ValueError, match=r"targets \(12,\) must be \[13\]"):
        linear_token_losses(h, w, targets[1:])
    with pytest.raises(ValueError, match="label_smoothing is 1.5"):
        linear_cross_entropy(h, w, targets, weights, label_smoothing=1.5)
    with pytest.raises(ValueError, match="soft_cap is 0"):
        linear_cross_entropy(h, w, targets, weights, soft_cap=0.0)
    with pytest.raises(ValueError, match="chunk is 0"):
        linear_token_losses(h, w, targets, chunk=0)
