"""Linear cross-entropy against optax on dense logits, values and gradients; float32 rounding of 37-term sums."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels import linear_cross_entropy
from tests.evidence import evidence

TOKENS, WIDTH, VOCAB = 13, 8, 37


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (TOKENS, WIDTH)),
        jax.random.normal(keys[1], (WIDTH, VOCAB)),
        jax.random.randint(keys[2], (TOKENS,), 0, VOCAB),
        jax.random.uniform(keys[3], (TOKENS,)).at[3].set(0.0),
    )


def dense(hidden, kernel, targets, weights, z_loss, soft_cap):
    logits = hidden @ kernel
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(weights * (nll + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2))


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

    got = jax.grad(ours, argnums=(0, 1))(h, w)
    expected = jax.grad(lambda h, w: 3.0 * dense(h, w, targets, weights, 1e-2, None), argnums=(0, 1))(h, w)
    error = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(got, expected, strict=True))
    evidence.record(error, 2e-5)


def test_terms_are_those_of_each_token():
    h, w, targets, weights = inputs()
    for chunk in (None, 4):
        _, terms = linear_cross_entropy(h, w, targets, weights, chunk=chunk)
        logits = h @ w
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        np.testing.assert_allclose(terms.nll, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(terms.lse, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)
        np.testing.assert_array_equal(terms.correct, logits.argmax(-1) == targets)


def test_uniform_logits_cost_log_vocab():
    loss, _ = linear_cross_entropy(
        jnp.ones((4, WIDTH)), jnp.zeros((WIDTH, VOCAB)), jnp.arange(4), jnp.ones(4) / 4, chunk=2
    )
    np.testing.assert_allclose(loss, np.log(VOCAB), rtol=1e-6)


def test_memory_grows_by_the_chunk_and_the_head_gradient_only():
    """Temporary bytes of a step at two vocabularies: their difference must not hold all logits."""
    tokens, width, chunk = 512, 32, 64

    def grown(vocab):
        def step(h, w, t):
            return jax.grad(
                lambda h, w: linear_cross_entropy(h, w, t, jnp.ones(tokens), chunk=chunk)[0], argnums=(0, 1)
            )(h, w)

        shapes = [((tokens, width), jnp.float32), ((width, vocab), jnp.float32), ((tokens,), jnp.int32)]
        arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
        return jax.jit(step).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    small, large = 4096, 16384
    allowed = 4 * (large - small) * (2 * chunk + 2 * width)  # logits and their gradient of one chunk; head gradient
    assert grown(large) - grown(small) <= allowed
    assert allowed < 4 * (large - small) * tokens


def test_shapes_that_disagree_are_named():
    h, w, targets, weights = inputs()
    with pytest.raises(ValueError, match=r"hidden has shape \(13, 8\), kernel \(9, 37\)"):
        linear_cross_entropy(h, jnp.zeros((9, VOCAB)), targets, weights)
    with pytest.raises(ValueError, match=r"targets \(12,\) and weights \(13,\) must be \[13\]"):
        linear_cross_entropy(h, w, targets[1:], weights)
