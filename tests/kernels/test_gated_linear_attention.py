"""Gated linear attention and SSD against numpy float64 loops, closed forms and laws of linear recurrences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_linear_attention import gated_linear_attention, semiseparable_matrix, ssd
from tests.evidence import evidence
from tests.kernels.recurrence import IDS, inputs, loop, product_flops, slopes, with_gradients, worst

FORMS = ("reference", "quadratic", "xla")
EXACT = 1e-12  # float64 rounding of sums over 21 tokens, relative to the largest entry
SINGLE = 3e-6  # the same in float32
BONUS = np.random.default_rng(3).standard_normal((4, 8))
SCALE = 0.7


def form(name, chunk=8):
    """One form as a function of its arrays: query, key, value, decay, state and, as the sixth, the bonus."""
    options = {"implementation": name, "scale": SCALE, "segment_ids": IDS, "chunk": chunk}

    def run(query, key, value, decay, state, bonus=None):
        return gated_linear_attention(query, key, value, decay, initial_state=state, bonus=bonus, **options)

    return run


@functools.cache
def by_form(name, case):
    """Results and gradients of one form in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, with_gradients(form(name))(*arrays_of(case)))


def arrays_of(case):
    arrays = inputs(vector=case != "scalar")[:5]
    return (*arrays, BONUS) if case == "bonus" else arrays


def by_loop(query, key, value, decay, state, bonus=None):
    return loop(query, key, value, decay, state, bonus=bonus, scale=SCALE, ids=IDS)


@evidence("C11", oracle="numpy float64 loop over tokens", code="pallas_kernels.gated_linear_attention")
@pytest.mark.parametrize("case", ["scalar", "vector", "bonus"])
def test_every_form_is_the_recurrence(case, evidence):
    """Groups, decays of all strengths, packing, NaN in absent tokens, an initial state, 21 tokens in chunks of 8."""
    expected = by_loop(*arrays_of(case))
    for name in FORMS:
        results, _ = by_form(name, case)
        evidence.record(worst(results, expected), EXACT)


@evidence("C11", oracle="central differences of a numpy float64 loop", code="pallas_kernels.gated_linear_attention")
@pytest.mark.parametrize("case", ["scalar", "vector", "bonus"])
def test_gradients_are_those_of_the_recurrence(case, evidence):
    """The reference against differences, whose own error is about 1e-9 of slopes of about 10; the forms against it."""
    arrays = arrays_of(case)
    _, gradients = by_form("reference", case)
    for gradient, (direction, slope) in zip(gradients, slopes(by_loop, arrays), strict=True):
        evidence.record(abs(np.sum(gradient * direction) - slope), 1e-7)
    for name in FORMS:
        assert worst(by_form(name, case)[1], gradients) <= EXACT
    for gradient in gradients[:4]:
        assert not gradient[IDS < 0].any()


@evidence("C10", oracle="numpy float64 loop, whatever the chunk", code="pallas_kernels.gated_linear_attention")
@pytest.mark.parametrize(("chunk", "case"), [(1, "vector"), (4, "scalar"), (64, "bonus")])
def test_chunks_of_any_size_agree(chunk, case, evidence):
    """21 tokens are no multiple of 4, and fewer than 64."""
    arrays = arrays_of(case)
    results = jax.jit(form("xla", chunk))(*(jnp.asarray(x, jnp.float32) for x in arrays))
    evidence.record(worst(results, by_loop(*arrays)), SINGLE)


@functools.cache
def single(vector):
    """Results and gradients of the chunked form, float32, compiled once a kind of decay."""
    return with_gradients(form("xla"))


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_single_precision_keeps_its_digits(vector):
    """Weak decays after ones of thousands are as exact as without them: no exponent is a difference of large sums."""
    arrays = inputs(vector=vector)[:5]
    results, gradients = single(vector)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert worst(results, by_loop(*arrays)) <= SINGLE
    assert worst(gradients, by_form("reference", "vector" if vector else "scalar")[1]) <= SINGLE
    arrays = (*arrays[:3], np.where(arrays[3] < -5, 100 * arrays[3], arrays[3]), arrays[4])
    results, _ = single(vector)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert worst(results, by_loop(*arrays)) <= SINGLE


@pytest.mark.parametrize("decay", [-20.0, -1e4, -np.inf])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_strong_decays_are_finite(vector, decay):
    """From -1e4 on every token stands alone: the state is k v^T of the last one."""
    arrays = inputs(vector=vector)[:5]
    arrays = (*arrays[:3], np.full_like(arrays[3], decay), arrays[4])
    results, gradients = single(vector)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert worst(results, by_loop(*arrays)) <= SINGLE
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


def test_packed_equals_separate():
    """Two documents of 8 tokens, one after the other with padding between, and each alone."""
    query, key, value, decay, *_ = inputs(vector=True, ids=np.zeros((2, 16), int))
    alone = jax.jit(functools.partial(gated_linear_attention, implementation="xla", chunk=4))
    packed = jax.jit(functools.partial(gated_linear_attention, implementation="xla", chunk=8))
    halves = [alone(*(x[:, part] for x in (query, key, value, decay))) for part in (slice(8), slice(8, None))]

    def pad(x):
        gap = np.full_like(x[:, :3], np.nan)
        return np.concatenate([gap, x[:, :8], gap, x[:, 8:], gap], axis=1)

    ids = np.repeat([[-1, 4, -5, 2, -1]], 2, axis=0).repeat([3, 8, 3, 8, 3], axis=1)
    out, last = packed(*(pad(x) for x in (query, key, value, decay)), segment_ids=ids)
    expected = (halves[0][0], halves[1][0], halves[1][1])
    assert worst((out[:, 3:11], out[:, 14:22], last), expected) <= SINGLE
    assert not np.asarray(out)[ids < 0].any()


def test_the_carried_state_continues_the_sequence():
    query, key, value, decay, state, _ = inputs(vector=True, ids=np.zeros((2, 32), int))
    run = jax.jit(functools.partial(gated_linear_attention, implementation="xla", chunk=8))
    whole = run(query, key, value, decay, initial_state=state)
    arrays = [[x[:, part] for x in (query, key, value, decay)] for part in (slice(16), slice(16, None))]
    first, carried = run(*arrays[0], initial_state=state)
    second, last = run(*arrays[1], initial_state=carried)
    assert worst((jnp.concatenate([first, second], axis=1), last), whole) <= SINGLE


# ---- what it reduces to ----------------------------------------------------------------------------------------------


@evidence("B13", oracle="tril(gamma^(i-j) q k^T) v in numpy", code="pallas_kernels.gated_linear_attention")
@pytest.mark.parametrize("gamma", [None, 1.0, 0.9])
def test_constant_decays_are_linear_attention_and_retention(gamma, evidence):
    query, key, value, *_ = inputs(vector=False, ids=np.zeros((2, 21), int), groups=4)
    decay = None if gamma is None else np.full(value.shape[:3], np.log(gamma))
    index = np.arange(21)
    mask = np.tril((gamma or 1.0) ** np.maximum(index[:, None] - index, 0))
    expected = np.einsum("bihk,bjhk,ij,bjhv->bihv", query, key, mask, value)
    out, _ = jax.jit(functools.partial(gated_linear_attention, chunk=8))(query, key, value, decay)
    evidence.record(worst([out], [expected]), SINGLE)


@evidence("C11", oracle="weights that sum to one return a constant", code="pallas_kernels.gated_linear_attention")
def test_normalised_attention_returns_constants(evidence):
    """phi = elu + 1, and a column of ones among the values gives the denominator (Katharopoulos et al. 2020)."""
    query, key, value, *_ = inputs(vector=False, ids=np.zeros((2, 21), int), groups=4)
    constant = np.random.default_rng(1).standard_normal(value.shape[-1])
    values = np.concatenate([np.broadcast_to(constant, value.shape), np.ones((*value.shape[:3], 1))], axis=-1)
    out, _ = jax.jit(gated_linear_attention)(jax.nn.elu(query) + 1, jax.nn.elu(key) + 1, values)
    evidence.record(worst([out[..., :-1] / out[..., -1:]], [np.broadcast_to(constant, value.shape)]), SINGLE)


# ---- state-space duality ---------------------------------------------------------------------------------------------

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def state_space():
    """The arguments of `ssd` in the order of NAMES; absent tokens are NaN."""
    rng = np.random.default_rng(5)
    B, C, x, _, state, _ = inputs(vector=False)
    dt, A = rng.standard_normal(x.shape[:3]), -rng.exponential(size=4)
    z = rng.standard_normal(x.shape)
    dt[IDS < 0], z[IDS < 0] = np.nan, np.nan
    return x, dt, A, B, C, rng.standard_normal(4), z, rng.standard_normal(4), np.swapaxes(state, 2, 3)


def ssd_loop(x, dt, A, B, C, D, z, dt_bias, state):
    """h = exp(dt A) h + dt x B^T, y = (h C + D x) silu(z), in numpy."""
    dt = np.log1p(np.exp(dt + dt_bias))
    out, state = loop(C, B, x * dt[..., None], dt * A, np.swapaxes(state, 2, 3), ids=IDS)
    out = (out + D[:, None] * x) * z / (1 + np.exp(-z))
    return np.where((IDS >= 0)[..., None, None], out, 0), np.swapaxes(state, 2, 3)


@evidence("B12", oracle="numpy float64 loop and its central differences", code="pallas_kernels.gated_linear_attention")
@evidence("C10", oracle="numpy float64 loop and its central differences", code="pallas_kernels.gated_linear_attention")
def test_ssd_is_the_state_space_recurrence(evidence):
    """Chunked, quadratic and sequential forms; every argument's gradient."""
    arrays = state_space()
    with jax.enable_x64(True):
        for name in FORMS:
            options = {"implementation": name, "dt_softplus": True, "segment_ids": IDS, "chunk": 8}

            def run(*arrays, options=options):
                return ssd(**dict(zip(NAMES, arrays, strict=True)), **options)

            if name == "xla":
                results, gradients = with_gradients(run)(*arrays)
                for gradient, (direction, slope) in zip(gradients, slopes(ssd_loop, arrays), strict=True):
                    assert abs(np.sum(np.asarray(gradient) * direction) - slope) <= 1e-7
            else:
                results = jax.jit(run)(*arrays)
            evidence.record(worst(results, ssd_loop(*arrays)), EXACT)


@evidence("B11", oracle="numpy matrix_rank and loop", code="pallas_kernels.gated_linear_attention")
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_the_matrix_is_semiseparable(vector, evidence):
    """Blocks on and below the diagonal have rank at most 3 (1, 2, 3, 3, 2, 1 for 6 tokens), the matrix has rank 6."""
    query, key, value, *_ = inputs(vector=vector, ids=np.zeros((2, 6), int), key_dim=3)
    shape = (2, 6, 4, 3)[: 4 if vector else 3]
    decay = -np.random.default_rng(2).exponential(size=shape)
    with jax.enable_x64(True):
        matrix = np.asarray(jax.jit(semiseparable_matrix)(decay, key, query))
    out, _ = loop(query, key, value, decay)
    evidence.record(worst([np.einsum("bhij,bjhv->bihv", matrix, value)], [out]), EXACT)
    for m in matrix.reshape(-1, 6, 6):
        assert [np.linalg.matrix_rank(m[i:, : i + 1]) for i in range(6)] == [1, 2, 3, 3, 2, 1]
        assert np.linalg.matrix_rank(m) == 6
        assert not np.triu(m, 1).any()


# ---- cost, dtypes, errors --------------------------------------------------------------------------------------------


def step_of(length, vector):
    """The gradient step of the chunked form in chunks of 8, and its arguments' shapes."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    arrays = [shape((1, length, 2, 8))] * (4 if vector else 3) + [shape((1, length, 2))] * (not vector)

    def step(*arrays):
        return gated_linear_attention(*arrays, implementation="xla", chunk=8)[0].sum()

    return jax.grad(step, argnums=(0, 1, 2, 3)), arrays


@evidence("C11", oracle="compiled memory_analysis", code="pallas_kernels.gated_linear_attention")
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_memory_and_operations_of_the_gradient_are_linear_in_length(vector, evidence):
    """Four times the tokens: four times the memory, less than twice the arguments'; exactly four times the products.

    Without recomputing the chunks the gradient would keep over five times the arguments' bytes.
    """
    sizes, flops = [], []
    for length in (512, 2048):
        step, arrays = step_of(length, vector)
        sizes.append(jax.jit(step).lower(*arrays).compile().memory_analysis().temp_size_in_bytes)
        flops.append(product_flops(step, *arrays))
    evidence.record(sizes[1] / sizes[0], 4.05)
    assert sizes[1] <= 2 * sum(4 * x.size for x in arrays)
    assert flops[1] == 4 * flops[0] > 0


def test_half_precision_values_are_rounded_once():
    """bfloat16 in and out, float32 between: the error is that of rounding the output, 2^-8 of it."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(vector=True, ids=np.zeros((2, 21), int))[:4]]
    out, state = jax.jit(functools.partial(gated_linear_attention, chunk=8))(*arrays)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    expected = loop(*(np.asarray(x, np.float64) for x in arrays))
    assert worst([state], expected[1:]) <= SINGLE
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], rtol=2**-8, atol=SINGLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (2, 6, 4)}, "query is float32"),
        ({"query": (2, 5, 4, 8)}, r"query has shape \(2, 5, 4, 8\), value \(2, 6, 4, 3\)"),
        ({"key": (2, 6, 3, 8)}, r"key has shape \(2, 6, 3, 8\), value \(2, 6, 4, 3\)"),
        ({"key": (2, 6, 4, 7)}, r"query has shape \(2, 6, 4, 8\), key \(2, 6, 4, 7\)"),
        (
            {"log_decay": (2, 6, 4, 1)},
            r"log_decay has shape \(2, 6, 4, 1\), key .* expected \(2, 6, 4\) or \(2, 6, 4, 8\)",
        ),
        ({"bonus": (4, 3)}, r"bonus has shape \(4, 3\), key .* expected \(4, 8\)"),
        ({"initial_state": (2, 4, 3, 8)}, r"initial_state has shape \(2, 4, 3, 8\), .* expected \(2, 4, 8, 3\)"),
        ({"segment_ids": (6,)}, r"segment_ids has shape \(6,\)"),
        ({"segment_ids": (2, 6)}, "has dtype float32: expected integers"),
    ],
)
def test_shapes_that_disagree_are_refused(change, message):
    shapes = {"query": (2, 6, 4, 8), "key": (2, 6, 4, 8), "value": (2, 6, 4, 3)} | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(gated_linear_attention, **{k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (2, 6)}, r"dt has shape \(2, 6\), x \(2, 6, 4, 3\), B .* expected \(2, 6, 4\)"),
        ({"B": (2, 6, 3, 8)}, r"B has shape \(2, 6, 3, 8\), x \(2, 6, 4, 3\)"),
        ({"C": (2, 6, 1, 8)}, r"C has shape \(2, 6, 1, 8\)"),
        ({"z": (2, 6, 4)}, r"z has shape \(2, 6, 4\)"),
        ({"segment_ids": (6,)}, r"segment_ids has shape \(6,\), .* expected \(2, 6\)"),
        ({"initial_state": (2, 4, 8, 3)}, r"initial_state has shape \(2, 4, 8, 3\), .* expected \(2, 4, 3, 8\)"),
    ],
)
def test_ssd_refuses_shapes_that_disagree(change, message):
    shapes = {"x": (2, 6, 4, 3), "dt": (2, 6, 4), "A": (4,), "B": (2, 6, 2, 8), "C": (2, 6, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ssd, **{k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})


def test_chunks_and_names_that_mean_nothing_are_refused():
    query = jnp.ones((1, 4, 1, 2))
    with pytest.raises(ValueError, match="chunk=48 must be a power of two"):
        gated_linear_attention(query, query, query, chunk=48)
    with pytest.raises(ValueError, match="unknown: use one of quadratic, reference, tpu, xla"):
        gated_linear_attention(query, query, query, implementation="cuda")
