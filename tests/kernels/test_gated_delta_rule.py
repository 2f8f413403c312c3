"""The gated delta rule against numpy float64 loops, and laws of a memory that replaces what it holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_delta_rule.xla import inverse
from tests.kernels.recurrence import IDS, inputs, loop, product_flops, slopes, with_gradients, worst

pytestmark = pytest.mark.mixers

EXACT = 1e-12  # float64 rounding of sums over 21 tokens, relative to the largest entry
SINGLE = 3e-6  # the same in float32
SCALE = 0.7
KINDS = pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])


def form(name, chunk=8):
    """One form as a function of query, key, value, decay, state and beta."""
    options = {"implementation": name, "scale": SCALE, "segment_ids": IDS, "chunk": chunk}

    def run(query, key, value, decay, state, beta):
        return gated_delta_rule(query, key, value, beta, decay, initial_state=state, **options)

    return run


@functools.cache
def by_form(name, vector):
    """Results and gradients of one form in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, with_gradients(form(name))(*inputs(vector=vector)))


def by_loop(*arrays):
    return loop(*arrays, scale=SCALE, ids=IDS)


@KINDS
def test_both_forms_are_the_recurrence(vector):
    """Groups, decays of all strengths, packing, NaN in absent tokens, an initial state, 21 tokens in chunks of 8."""
    expected = by_loop(*inputs(vector=vector))
    for name in ("reference", "xla"):
        assert worst(by_form(name, vector)[0], expected) <= EXACT


@KINDS
def test_gradients_are_those_of_the_recurrence(vector):
    """The reference against differences, whose own error is about 1e-9 of slopes of about 10; "xla" against it."""
    arrays = inputs(vector=vector)
    _, gradients = by_form("reference", vector)
    for gradient, (direction, slope) in zip(gradients, slopes(by_loop, arrays), strict=True):
        assert abs(np.sum(gradient * direction) - slope) <= 1e-7
    assert worst(by_form("xla", vector)[1], gradients) <= EXACT
    for gradient in (*gradients[:4], gradients[5]):
        assert not gradient[IDS < 0].any()


@pytest.mark.parametrize(("chunk", "vector"), [(1, False), (4, True), (64, True)])
def test_chunks_of_any_size_agree(chunk, vector):
    """21 tokens are no multiple of 4, and fewer than 64."""
    arrays = inputs(vector=vector)
    results = jax.jit(form("xla", chunk))(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert worst(results, by_loop(*arrays)) <= SINGLE


@functools.cache
def single(vector):
    """Results and gradients of the chunked form, float32, compiled once a kind of decay."""
    return with_gradients(form("xla"))


@KINDS
def test_single_precision_keeps_its_digits(vector):
    """Weak decays after ones of thousands are as exact as without them: no exponent is a difference of large sums."""
    arrays = inputs(vector=vector)
    results, gradients = single(vector)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert worst(results, by_loop(*arrays)) <= SINGLE
    assert worst(gradients, by_form("reference", vector)[1]) <= SINGLE
    arrays = (*arrays[:3], np.where(arrays[3] < -5, 100 * arrays[3], arrays[3]), *arrays[4:])
    results, _ = single(vector)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert worst(results, by_loop(*arrays)) <= SINGLE


@pytest.mark.parametrize("decay", [-20.0, -1e4, -np.inf])
@KINDS
def test_strong_decays_are_finite(vector, decay):
    """From -1e4 on every token stands alone: the state is beta k v^T of the last one."""
    arrays = inputs(vector=vector)
    arrays = (*arrays[:3], np.full_like(arrays[3], decay), *arrays[4:])
    results, gradients = single(vector)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert worst(results, by_loop(*arrays)) <= SINGLE
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


def test_packed_equals_separate_and_the_carried_state_continues():
    """Two documents of 8 tokens, with padding between, and each alone; then both as one document in two calls."""
    query, key, value, decay, state, beta = inputs(vector=False, ids=np.zeros((2, 16), int))
    arrays = (query, key, value, beta, decay)
    run = jax.jit(functools.partial(gated_delta_rule, implementation="xla", chunk=4))
    first, second = (tuple(x[:, part] for x in arrays) for part in (slice(8), slice(8, None)))
    one, carried = run(*first, initial_state=state)
    two, last = run(*second, initial_state=np.zeros_like(state))

    def pad(x):
        gap = np.full_like(x[:, :3], np.nan)
        return np.concatenate([gap, x[:, :8], gap, x[:, 8:], gap], axis=1)

    ids = np.repeat([[-1, 4, -5, 2, -1]], 2, axis=0).repeat([3, 8, 3, 8, 3], axis=1).astype(np.int32)
    out, end = run(*(pad(x) for x in arrays), initial_state=state, segment_ids=ids)
    assert worst((out[:, 3:11], out[:, 14:22], end), (one, two, last)) <= SINGLE
    assert not np.asarray(out)[ids < 0].any()
    whole, end = run(*arrays, initial_state=state)
    two, last = run(*second, initial_state=carried)
    assert worst((jnp.concatenate([one, two], axis=1), last), (whole, end)) <= SINGLE


# ---- laws of the memory ----------------------------------------------------------------------------------------------


def test_orthonormal_keys_recall_what_they_stored():
    """beta = 1: eight orthonormal keys, then seven of them again with new values; each recalls its latest value."""
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.standard_normal((8, 8)))[0][np.r_[:8, :7]]
    values = rng.standard_normal((15, 6))
    arrays = (np.broadcast_to(x[None, :, None], (1, 15, 1, x.shape[1])) for x in (keys, keys, values))
    out, state = jax.jit(functools.partial(gated_delta_rule, chunk=4))(*arrays, np.ones((1, 15, 1)))
    assert worst([out[0, :, 0]], [values]) <= SINGLE
    assert worst([keys[:8] @ state[0, 0]], [values[np.r_[8:15, 7]]]) <= SINGLE


def test_half_a_step_moves_half_the_way():
    """A key of length 1 that holds v0 and is written v1 with beta holds v0 + beta (v1 - v0)."""
    key = np.array([[[[0.6, 0.8]]]], np.float32)
    (old, new), beta = np.array([[1.0, -2.0, 3.0], [5.0, 0.5, -1.0]], np.float32), 0.3
    state = np.einsum("bthk,v->bhkv", key, old)
    out, _ = gated_delta_rule(
        key, key, new[None, None, None], np.full((1, 1, 1), beta, np.float32), initial_state=state
    )
    np.testing.assert_allclose(out[0, 0, 0], old + beta * (new - old), rtol=1e-6)  # float32 rounding


@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_triangular_inverse_and_its_gradient(size):
    rng = np.random.default_rng(0)
    lower = np.tril(rng.standard_normal((3, size, size)), -1)
    weights = rng.standard_normal(lower.shape)
    with jax.enable_x64(True):
        found = jax.jit(inverse)(lower)
        gradient = jax.jit(jax.grad(lambda x: (weights * inverse(x)).sum()))(lower)
    expected = np.linalg.inv(np.eye(size) + lower)
    assert worst([found], [expected]) <= EXACT
    turned = np.swapaxes(expected, 1, 2)
    np.testing.assert_allclose(gradient, -turned @ weights @ turned, rtol=1e-9, atol=1e-9 * np.abs(gradient).max())


# ---- cost, dtypes, errors --------------------------------------------------------------------------------------------


def test_memory_and_operations_of_the_gradient_are_linear_in_length():
    """Four times the tokens: four times the memory, less than twice the arguments'; exactly four times the products.

    Without recomputing the chunks the gradient would keep over nine times the arguments' bytes.
    """

    def step(*arrays):
        return gated_delta_rule(*arrays, implementation="xla", chunk=8)[0].sum()

    gradient, sizes, flops = jax.grad(step, argnums=(0, 1, 2, 3, 4)), [], []
    for length in (512, 2048):
        shapes = [(1, length, 2, 8)] * 3 + [(1, length, 2)] * 2
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        sizes.append(jax.jit(gradient).lower(*arrays).compile().memory_analysis().temp_size_in_bytes)
        flops.append(product_flops(gradient, *arrays))
    assert sizes[1] <= 4.05 * sizes[0]
    assert sizes[1] <= 2 * sum(4 * x.size for x in arrays)
    assert flops[1] == 4 * flops[0] > 0


def test_the_output_has_the_dtype_of_the_values():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    out, state = jax.eval_shape(gated_delta_rule, *[shape((2, 5, 4, 8))] * 3, shape((2, 5, 4)))
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert (out.shape, state.shape) == ((2, 5, 4, 8), (2, 4, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": (2, 6)}, r"beta has shape \(2, 6\), value \(2, 6, 4, 3\)"),
        ({"key": (2, 6, 3, 8)}, r"key has shape \(2, 6, 3, 8\), value \(2, 6, 4, 3\)"),
        ({"log_decay": (2, 6, 8)}, r"log_decay has shape \(2, 6, 8\), .* expected \(2, 6, 4\) or \(2, 6, 4, 8\)"),
        ({"initial_state": (2, 4, 3, 8)}, r"initial_state has shape \(2, 4, 3, 8\), .* expected \(2, 4, 8, 3\)"),
    ],
)
def test_shapes_that_disagree_are_refused(change, message):
    shapes = {"query": (2, 6, 4, 8), "key": (2, 6, 4, 8), "value": (2, 6, 4, 3), "beta": (2, 6, 4)} | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(gated_delta_rule, **{k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})


def test_names_that_mean_nothing_are_refused():
    query, beta = jnp.ones((1, 4, 1, 2)), jnp.ones((1, 4, 1))
    with pytest.raises(ValueError, match="unknown: use one of reference, tpu, xla"):
        gated_delta_rule(query, query, query, beta, implementation="quadratic")
