"""The selective scan against a numpy float64 loop, closed forms and laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import selective_scan, xla
from tests.evidence import evidence
from tests.kernels.recurrence import IDS, slopes, with_gradients, worst

pytestmark = pytest.mark.mixers

FORMS = ("reference", "xla")
EXACT = 1e-12  # float64 rounding of sums over 21 tokens, 6 channels and 4 states, relative to the largest entry
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
CASES = ["all", "reverse", "bare"]


def arrays(case, ids=IDS, width=6, groups=2, state=4, seed=0):
    """Every argument, or those that must be there; NaN where absent."""
    rng = np.random.default_rng(seed)
    batch, length = ids.shape
    x, dt, z = rng.standard_normal((3, batch, length, width))
    B, C = rng.standard_normal((2, batch, length, groups, state))
    for values in (x, dt, z, B, C):
        values[ids < 0] = np.nan
    A, D, bias = -rng.uniform(0.1, 4, (width, state)), rng.standard_normal(width), rng.standard_normal(width)
    if case == "bare":
        return x, np.log1p(np.exp(dt)), A, B, C
    return x, dt, A, B, C, D, z, bias, rng.standard_normal((batch, width, state))


def run(name, case, ids=IDS):
    """One form, as a function of a case's arrays."""

    def function(*arrays):
        named = dict(zip(NAMES, arrays))
        options = {"reverse": case == "reverse", "dt_softplus": case != "bare", "segment_ids": ids}
        return selective_scan(**named, **options, implementation=name)

    return function


def loop(case, ids=IDS):
    """The recurrence, token by token and channel by channel."""

    def function(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None):
        batch, length, width = x.shape
        state = np.zeros((batch, *A.shape)) if state is None else np.array(state)
        y = np.zeros(x.shape)
        for b in range(batch):
            last = None
            for t in range(length)[:: -1 if case == "reverse" else 1]:
                if ids[b, t] < 0:
                    continue
                if last is not None and ids[b, t] != last:
                    state[b] = 0
                last = ids[b, t]
                for d in range(width):
                    group = d // (width // B.shape[2])
                    step = dt[b, t, d] if case == "bare" else np.log1p(np.exp(dt[b, t, d] + dt_bias[d]))
                    state[b, d] = np.exp(step * A[d]) * state[b, d] + step * B[b, t, group] * x[b, t, d]
                    y[b, t, d] = C[b, t, group] @ state[b, d]
                    if case != "bare":
                        gate = z[b, t, d] / (1 + np.exp(-z[b, t, d]))
                        y[b, t, d] = (y[b, t, d] + D[d] * x[b, t, d]) * gate
        return y, state

    return function


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    """21 tokens in chunks of 8, taken in parts of 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "CHUNK", 8)
        patch.setattr(xla, "PART", 3)
        yield


@functools.cache
def by_form(name, case):
    """Results and gradients in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, with_gradients(run(name, case))(*arrays(case)))


@evidence("B09", oracle="numpy float64 loop over tokens and channels", code="pallas_kernels.selective_scan")
@evidence("C09", oracle="numpy float64 loop over tokens and channels", code="pallas_kernels.selective_scan")
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_the_recurrence(case, evidence):
    """Groups, skip, gate, bias, softplus, packing, NaN in absent tokens, an initial state; or nothing of these."""
    expected = loop(case)(*arrays(case))
    for name in FORMS:
        evidence.record(worst(by_form(name, case)[0], expected), EXACT)


@evidence("B09", oracle="central differences of a numpy float64 loop", code="pallas_kernels.selective_scan")
@evidence("C09", oracle="jax.grad of lax.scan over tokens", code="pallas_kernels.selective_scan.xla")
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_recurrence(case, evidence):
    """The sequential form against differences, whose own error is about 1e-9; the chunked form against it."""
    _, gradients = by_form("reference", case)
    for gradient, (direction, slope) in zip(gradients, slopes(loop(case), arrays(case)), strict=True):
        evidence.record(abs(np.sum(gradient * direction) - slope), 1e-6)
    assert worst(by_form("xla", case)[1], gradients) <= EXACT
    named = dict(zip(NAMES, gradients))
    assert not any(named[name][IDS < 0].any() for name in ("x", "dt", "B", "C", "z") if name in named)


@evidence("C09", oracle="jax.grad of lax.scan over tokens, float32", code="pallas_kernels.selective_scan.xla")
def test_float32_gradients_of_every_input(evidence):
    """No segments, 21 tokens in chunks of 8; sums over 42 tokens in another order round by a few 1e-7."""
    single = [jnp.asarray(x, jnp.float32) for x in arrays("all", np.zeros((2, 21)))]
    expected, got = (with_gradients(run(name, "all", None))(*single) for name in FORMS)
    evidence.record(worst(got[1], expected[1]), 1e-6)
    assert worst(got[0], expected[0]) <= 1e-6


@evidence("C09", oracle="float64 recurrence of the rounded inputs", code="pallas_kernels.selective_scan.xla")
def test_bfloat16_is_as_good_as_the_sequential_scan(evidence):
    """RMS error at most 1.3 times that of the sequential form with the same inputs; the state stays float32."""
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays("all")]
    exact, _ = loop("all")(*(np.asarray(x, np.float64) for x in rounded))
    errors = []
    for name in FORMS:
        y, final = jax.jit(run(name, "all"))(*rounded)
        assert (y.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
        errors.append(np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2)))
    evidence.record(errors[1], 1.3 * errors[0])


@evidence("B09", oracle="convolution with C exp(k dt A) dt B", code="pallas_kernels.selective_scan")
def test_constant_parameters_are_a_convolution(evidence):
    """Step, B and C the same for all tokens: a linear system without memory of time. Float32, sums over 16 tokens."""
    rng = np.random.default_rng(4)
    x, A = rng.standard_normal((1, 16, 4)), -rng.uniform(0.1, 2, (4, 3))
    B, C = rng.standard_normal((2, 3))
    step = 0.3
    response = np.einsum("n,dkn,n->kd", C, np.exp(step * A[:, None] * np.arange(16)[:, None]), step * B)
    expected = np.stack([np.convolve(x[0, :, d], response[:, d])[:16] for d in range(4)], axis=1)
    B, C = (np.broadcast_to(v, (1, 16, 1, 3)) for v in (B, C))
    y, _ = jax.jit(selective_scan)(x, np.full(x.shape, step), A, B, C)
    evidence.record(worst([y[0]], [expected]), 2e-6)


@evidence("C09", oracle="law: parts with carried state, flips, packing", code="pallas_kernels.selective_scan.xla")
def test_parts_flips_and_packing(evidence):
    """Float64. Results and gradients of a cut sequence, a reversed one, and two documents in one row."""
    x, dt, A, B, C = arrays("bare", np.zeros((2, 13)))

    def parts(x, dt, A, B, C):
        cut = lambda part: [v[:, part] for v in (B, C)]
        first, state = selective_scan(x[:, :6], dt[:, :6], A, *cut(slice(6)))
        second, state = selective_scan(x[:, 6:], dt[:, 6:], A, *cut(slice(6, None)), initial_state=state)
        return jnp.concatenate([first, second], axis=1), state

    def flipped(x, dt, A, B, C):
        x, dt, B, C = (v[:, ::-1] for v in (x, dt, B, C))
        y, state = selective_scan(x, dt, A, B, C, reverse=True)
        return y[:, ::-1], state

    def packed(x, dt, A, B, C):
        x, dt, B, C = (v.reshape(1, 26, *v.shape[2:]) for v in (x, dt, B, C))
        ids = np.arange(2).repeat(13)[None]
        y, last = selective_scan(x, dt, A, B, C, segment_ids=ids)
        _, first = selective_scan(x, dt, A, B, C, segment_ids=np.where(ids == 0, 0, -1))
        return y.reshape(2, 13, -1), jnp.concatenate([first, last])

    arguments = (x, dt, A, B, C)
    with jax.enable_x64(True):
        expected = jax.tree.leaves(with_gradients(run("reference", "bare", None))(*arguments))
        for law in (parts, flipped, packed):
            evidence.record(worst(jax.tree.leaves(with_gradients(law)(*arguments)), expected), EXACT)


@evidence("C09", oracle="compiled memory of forward and backward", code="pallas_kernels.selective_scan.xla")
def test_memory_has_no_state_for_every_token(evidence, monkeypatch):
    """A token more costs a few arrays of its width, far less than its state, of which the sequential form keeps 3."""
    monkeypatch.setattr(xla, "CHUNK", 64)
    width, state = 32, 16

    def bytes_per_token(name):
        sizes = []
        for length in (256, 512):
            shapes = [(1, length, width)] * 2 + [(width, state)] + [(1, length, 1, state)] * 2
            loss = lambda *arrays: sum(map(jnp.sum, selective_scan(*arrays, implementation=name)))
            gradients = jax.jit(jax.grad(loss, range(5))).lower(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
            sizes.append(gradients.compile().memory_analysis().temp_size_in_bytes)
        return (sizes[1] - sizes[0]) / 256

    all_states = 4 * width * state
    assert bytes_per_token("reference") > 2 * all_states
    evidence.record(bytes_per_token("xla"), all_states)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"x has shape \(2, 4\)", {"x": np.ones((2, 4))}),
        (ValueError, r"dt has shape \(2, 4, 1\), x \(2, 4, 6\)", {"dt": np.ones((2, 4, 1))}),
        (ValueError, r"z has shape \(6,\), x \(2, 4, 6\)", {"z": np.ones(6)}),
        (ValueError, r"A has shape \(6, 5\), x \(2, 4, 6\) and B \(2, 4, 2, 3\)", {"A": np.ones((6, 5))}),
        (ValueError, r"C has shape \(2, 4, 1, 3\), B \(2, 4, 2, 3\)", {"C": np.ones((2, 4, 1, 3))}),
        (ValueError, "groups must divide width", {k: np.ones((2, 4, 4, 3)) for k in "BC"}),
        (ValueError, r"B has shape \(2, 5, 1, 3\), x \(2, 4, 6\)", {k: np.ones((2, 5, 1, 3)) for k in "BC"}),
        (ValueError, r"D has shape \(1,\)", {"D": np.ones(1)}),
        (ValueError, r"dt_bias has shape \(2,\)", {"dt_bias": np.ones(2)}),
        (ValueError, r"initial_state has shape \(6, 3\)", {"initial_state": np.ones((6, 3))}),
        (ValueError, r"segment_ids has shape \(2,\), x \(2, 4, 6\)", {"segment_ids": np.zeros(2, int)}),
        (ValueError, "x of shape .* dtype int32", {"x": np.ones((2, 4, 6), np.int32)}),
        (ValueError, "use one of hopper, reference, tpu, xla", {"implementation": "fast"}),
    ],
)
def test_errors(error, message, options):
    shapes = {"x": (2, 4, 6), "dt": (2, 4, 6), "A": (6, 3), "B": (2, 4, 2, 3), "C": (2, 4, 2, 3)}
    with pytest.raises(error, match=message):
        selective_scan(**{name: np.ones(shape) for name, shape in shapes.items()} | options)
