"""Linear recurrences against a numpy float64 loop, closed forms and laws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_recurrence import linear_recurrence
from tests.evidence import evidence
from tests.kernels.recurrence import IDS, slopes, with_gradients, worst

FORMS = ("reference", "xla")
EXACT = 1e-12  # float64 rounding of sums over 21 tokens, relative to the largest entry
CASES = ["real", "complex", "reverse"]


def arrays(case, ids=IDS, width=3):
    """a, b, initial state; complex numbers as a last axis of two, a without a width of its own; NaN where absent."""
    rng = np.random.default_rng(0)
    parts = (2,) if case == "complex" else ()
    a = rng.uniform(-1, 1, (*ids.shape, 1, *parts))
    b = rng.standard_normal((*ids.shape, width, *parts))
    a[ids < 0], b[ids < 0] = np.nan, np.nan
    return a, b, rng.standard_normal((ids.shape[0], width, *parts))


def run(name, case, ids=IDS):
    """One form, from and to the arrays of a case."""

    def function(a, b, state):
        if case == "complex":
            a, b, state = (x[..., 0] + 1j * x[..., 1] for x in (a, b, state))
        options = {"chunk": 4} if name == "xla" else {}
        results = linear_recurrence(
            a, b, initial_state=state, segment_ids=ids, reverse=case == "reverse", implementation=name, **options
        )
        return tuple(jnp.stack([x.real, x.imag], -1) if case == "complex" else x for x in results)

    return function


def loop(case, ids=IDS):
    """The recurrence, token by token."""

    def function(a, b, state):
        if case == "complex":
            a, b, state = (x[..., 0] + 1j * x[..., 1] for x in (a, b, state))
        states, state = np.zeros(b.shape, b.dtype), np.array(state)
        for row in range(b.shape[0]):
            last = None
            for t in range(b.shape[1])[:: -1 if case == "reverse" else 1]:
                if ids[row, t] < 0:
                    continue
                if last is not None and ids[row, t] != last:
                    state[row] = 0
                last = ids[row, t]
                state[row] = states[row, t] = a[row, t] * state[row] + b[row, t]
        return tuple(np.stack([x.real, x.imag], -1) if case == "complex" else x for x in (states, state))

    return function


@functools.cache
def by_form(name, case):
    """Results and gradients in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, with_gradients(run(name, case))(*arrays(case)))


def whole(a, b, **options):
    """Both results of the chunked form, 5 tokens a chunk, compiled."""
    return jax.jit(functools.partial(linear_recurrence, implementation="xla", chunk=5, **options))(a, b)


@evidence("C08", oracle="numpy float64 loop over tokens", code="pallas_kernels.linear_recurrence")
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_the_recurrence(case, evidence):
    """Packing, NaN in absent tokens, an initial state, an `a` to broadcast, 21 tokens in chunks of 4."""
    expected = loop(case)(*arrays(case))
    for name in FORMS:
        evidence.record(worst(by_form(name, case)[0], expected), EXACT)


@evidence("C08", oracle="central differences of a numpy float64 loop", code="pallas_kernels.linear_recurrence")
@evidence("C08", oracle="jax.grad of lax.scan", code="pallas_kernels.linear_recurrence.xla")
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_recurrence(case, evidence):
    """The sequential form against differences, whose own error is about 1e-9; the chunked form against it."""
    _, gradients = by_form("reference", case)
    for gradient, (direction, slope) in zip(gradients, slopes(loop(case), arrays(case)), strict=True):
        evidence.record(abs(np.sum(gradient * direction) - slope), 1e-7)
    assert worst(by_form("xla", case)[1], gradients) <= EXACT
    assert not any(gradient[IDS < 0].any() for gradient in gradients[:2])


@evidence("C08", oracle="geometric series (1 - a^t) / (1 - a)", code="pallas_kernels.linear_recurrence")
def test_constant_factor_gives_the_geometric_series(evidence):
    """Float32: each of up to 16 additions rounds by 6e-8, and (1 - a) the series weighs the last most."""
    factors = np.array([0.5, 0.9, -0.9, 0.3 + 0.4j], np.complex64)
    states, final = whole(factors, np.ones((1, 17, 4), np.complex64))
    powers = factors.astype(np.complex128) ** np.arange(1, 18)[:, None]
    series = (1 - powers) / (1 - factors.astype(np.complex128))
    evidence.record(np.max(np.abs(states[0] - series)), 5e-6)
    assert np.array_equal(final, states[:, -1])


@evidence("C08", oracle="law: affine maps compose associatively", code="pallas_kernels.linear_recurrence")
def test_composed_pairs_reach_the_same_states(evidence):
    """(a2, b2) after (a1, b1) is (a2 a1, a2 b1 + b2): over pairs the recurrence visits every second state."""
    rng = np.random.default_rng(1)
    a, b = rng.uniform(-1, 1, (2, 24, 3)), rng.standard_normal((2, 24, 3))
    with jax.enable_x64(True):
        states, _ = whole(a, b)
        paired, _ = whole(a[:, 1::2] * a[:, ::2], a[:, 1::2] * b[:, ::2] + b[:, 1::2])
        chunks = [jax.jit(functools.partial(linear_recurrence, chunk=n))(a, b)[0] for n in (1, 64)]
    evidence.record(worst([paired, *chunks], [states[:, 1::2], states, states]), 1e-14)


@evidence("C08", oracle="law: parts with carried state, flips, packing", code="pallas_kernels.linear_recurrence")
def test_parts_flips_and_packing(evidence):
    """Float64. Results and gradients of a cut sequence, a reversed one, and two documents in one row."""
    rng = np.random.default_rng(2)
    a, b = rng.uniform(-1, 1, (2, 13, 3)), rng.standard_normal((2, 13, 3))

    def parts(a, b):
        first, state = linear_recurrence(a[:, :6], b[:, :6], chunk=4)
        second, state = linear_recurrence(a[:, 6:], b[:, 6:], initial_state=state, chunk=4)
        return jnp.concatenate([first, second], axis=1), state

    def flipped(a, b):
        states, state = linear_recurrence(a[:, ::-1], b[:, ::-1], reverse=True, chunk=4)
        return states[:, ::-1], state

    def packed(a, b):
        row = [x.reshape(1, 26, 3) for x in (a, b)]
        states, last = linear_recurrence(*row, segment_ids=np.arange(2).repeat(13)[None], chunk=4)
        return states.reshape(2, 13, 3), jnp.stack([states[0, 12], last[0]])

    with jax.enable_x64(True):
        expected = jax.tree.leaves(with_gradients(functools.partial(linear_recurrence, chunk=13))(a, b))
        for law in (parts, flipped, packed):
            evidence.record(worst(jax.tree.leaves(with_gradients(law)(a, b)), expected), EXACT)


@evidence("C08", oracle="float64 recurrence of the rounded inputs", code="pallas_kernels.linear_recurrence.xla")
def test_bfloat16_is_as_good_as_the_sequential_scan(evidence):
    """RMS error at most 1.3 times that of the sequential form with the same inputs; the state stays float32."""
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.uniform(0.9, 1, (2, 96, 8)), jnp.bfloat16)
    b = jnp.asarray(rng.standard_normal((2, 96, 8)), jnp.bfloat16)
    exact, _ = loop("real", np.zeros((2, 96)))(*(np.asarray(x, np.float64) for x in (a, b)), np.zeros((2, 8)))
    errors = []
    for name in FORMS:
        states, final = linear_recurrence(a, b, implementation=name)
        assert (states.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
        errors.append(np.sqrt(np.mean((np.asarray(states, np.float64) - exact) ** 2)))
    evidence.record(errors[1], 1.3 * errors[0])


def test_gradient_keeps_the_states_and_one_number_a_channel():
    """A factor that all tokens share is not spread over them for the backward pass."""
    a, b = jnp.ones(8), jnp.ones((2, 256, 8))
    saved = jax.eval_shape(lambda a, b: jax.vjp(lambda a, b: linear_recurrence(a, b)[0], a, b)[1], a, b)
    kept = sum(math.prod(x.shape) for x in jax.tree.leaves(saved))
    assert b.size <= kept <= b.size + 64


def test_states_of_absent_rows_and_dtypes():
    a, b = jnp.full((2, 4, 1), 0.5), jnp.ones((2, 4, 1))
    states, final = whole(a, b, initial_state=np.full((2, 1), 3, np.float32), segment_ids=np.full((2, 4), -1))
    assert not np.any(states)
    assert np.array_equal(final, [[3], [3]])
    assert jax.eval_shape(linear_recurrence, a.astype(jnp.complex64), b)[0].dtype == jnp.complex64
    assert jax.eval_shape(linear_recurrence, a, b.astype(jnp.float16))[0].dtype == jnp.float16


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"a has shape \(2, 5, 3\), b \(2, 4, 3\)", {"a": np.ones((2, 5, 3))}),
        (ValueError, r"initial_state has shape \(3,\), b \(2, 4, 3\)", {"initial_state": np.ones(3)}),
        (ValueError, "initial_state is complex", {"initial_state": np.ones((2, 3), complex)}),
        (ValueError, r"segment_ids has shape \(4,\), b \(2, 4, 3\)", {"segment_ids": np.zeros(4, int)}),
        (ValueError, "segment_ids .* dtype float32", {"segment_ids": np.zeros((2, 4), np.float32)}),
        (ValueError, r"b has shape \(2, 0, 3\)", {"b": np.ones((2, 0, 3)), "a": np.ones(3)}),
        (ValueError, "a of shape .* dtype int32", {"a": np.ones((2, 4, 3), np.int32)}),
        (ValueError, "chunk=0", {"chunk": 0}),
        (ValueError, "use one of reference, xla", {"implementation": "tpu"}),
        (NotImplementedError, '"reference" has no chunk', {"implementation": "reference", "chunk": 2}),
    ],
)
def test_errors(error, message, options):
    with pytest.raises(error, match=message):
        linear_recurrence(**{"a": np.ones((2, 4, 3)), "b": np.ones((2, 4, 3)), **options})
