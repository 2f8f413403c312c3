"""The TPU's gated delta rule, simulated on the CPU, against float64; memories start as NaN, a race fails."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Literal

from pallas_kernels.gated_delta_rule import gated_delta_rule, reference, tpu, xla
from pallas_kernels.gated_linear_attention.call import prepare
from pallas_kernels.segments import absent_as_zero, marks
from tests.evidence import evidence
from tests.kernels.recurrence import IDS, inputs, loop, with_gradients, worst

pytestmark = pytest.mark.mixers

TOLERANCE = 1e-6  # float32 rounding of sums over some 20 tokens, as a part of the largest entry
RATIO = 1.3  # of root mean square errors of two orders of the same roundings; measured at most 1.24
SCALE = 0.7
KINDS = pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])


@contextlib.contextmanager
def simulated():
    """Kernels run on the CPU; every number that was not written is NaN; a race fails."""
    interpret_pallas_call.races = None
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        yield
    assert interpret_pallas_call.races is not None, "no kernel was simulated"
    assert not interpret_pallas_call.races.races_found


def call_of(query, key, value, decay, state, beta, ids):
    """The checked call, and beta as the implementations take it."""
    return prepare(query, key, value, decay, None, state, ids, SCALE, 8), absent_as_zero(marks(ids), beta)


def kernel(*arrays, ids=IDS, chunk=8, chunks=1, heads=2):
    """By blocks of these sizes, small enough that there are several along every axis."""
    call, beta = call_of(*arrays, ids)
    tiling = dataclasses.replace(tpu.tile(call, True), chunk=chunk, chunks=chunks, heads=heads)
    return tpu.delta_rule(tiling, tpu.operands(call, beta))


def plain(module, *arrays, ids=IDS):
    """The same by another implementation."""
    return module.run(*call_of(*arrays, ids))


@functools.cache
def compiled(**sizes):
    """The kernel's results and gradients, compiled once."""
    return with_gradients(functools.partial(kernel, **sizes))


def simulate(function, arrays):
    with simulated():
        return jax.block_until_ready(function(*arrays))


def single(arrays, dtype=jnp.float32):
    return [jnp.asarray(x, dtype) for x in arrays]


@functools.cache
def exact(vector):
    """Results by numpy loops in float64, gradients by jax.grad of the recurrence in float64."""
    arrays = inputs(vector=vector)
    with jax.enable_x64(True):
        _, gradients = jax.tree.map(np.asarray, with_gradients(functools.partial(plain, reference))(*arrays))
    return loop(*arrays, scale=SCALE, ids=IDS), gradients


BLOCKS = {
    "scalar": (False, {"chunk": 4, "heads": 2}),
    "part_of_a_group": (False, {"chunk": 2, "chunks": 2, "heads": 1}),
    "vector": (True, {"chunk": 4, "chunks": 2, "heads": 4}),
}


@evidence("C11", oracle="float64 loops; jax.grad of the recurrence", code="pallas_kernels.gated_delta_rule.tpu")
@pytest.mark.parametrize("name", BLOCKS)
def test_agrees_with_float64(name, evidence):
    """Groups of two heads, packing, NaN in absent tokens, a first state, 21 tokens in three blocks."""
    vector, sizes = BLOCKS[name]
    results, gradients = simulate(compiled(**sizes), single(inputs(vector=vector)))
    expected, slopes = exact(vector)
    evidence.record(worst(results, expected), TOLERANCE)
    evidence.record(worst(gradients, slopes), TOLERANCE)
    for gradient in (*gradients[:4], gradients[5]):
        assert not np.asarray(gradient)[IDS < 0].any()


@pytest.mark.parametrize("decay", [-50.0, -np.inf])
def test_strong_decays_are_exact_and_finite(decay):
    """Beside weak ones in other heads: sums of decays are not rounded, and what is forgotten is no NaN."""
    arrays = inputs(vector=False)
    arrays[3][:, ::3, 1:] = decay
    results, gradients = simulate(compiled(chunk=4, heads=2), single(arrays))
    assert worst(results, loop(*arrays, scale=SCALE, ids=IDS)) <= TOLERANCE
    assert all(bool(jnp.isfinite(x).all()) for x in gradients)


def test_a_carried_state_continues_and_packed_documents_are_apart():
    """10 and 11 tokens in two calls are 21 in one; packed with other ids they are two calls without a carried state.

    Gradients too, among them those that pass through the carried state.
    """
    arrays = single(inputs(vector=False, ids=np.zeros((2, 21), np.int32)))
    step = functools.partial(kernel, chunk=4, heads=4)

    def whole(carry, *arrays):
        ids = jnp.where(jnp.arange(21) < 10, 0, 1 - carry).astype(jnp.int32)
        return step(*arrays, ids=jnp.broadcast_to(ids, (2, 21)))

    def in_turn(carry, query, key, value, decay, state, beta):
        first, second = ([x[:, part] for x in (query, key, value, decay)] for part in (slice(10), slice(10, None)))
        out, state = step(*first, state, beta[:, :10], ids=None)
        rest, last = step(*second, carry * state, beta[:, 10:], ids=None)
        return jnp.concatenate([out, rest], axis=1), last

    whole, in_turn = map(with_gradients, (whole, in_turn))
    for carry in (1.0, 0.0):
        (results, (_, *gradients)), (expected, (_, *slopes)) = (simulate(f, [carry, *arrays]) for f in (in_turn, whole))
        assert worst(results, expected) <= TOLERANCE
        assert worst(gradients, slopes) <= TOLERANCE


def with_rounded_products(function, *arguments):
    """`function(*arguments)` with the operands of every product rounded to bfloat16, as XLA does it on a TPU."""

    def evaluate(jaxpr, constants, *values):
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *values], strict=True))
        for equation in jaxpr.eqns:
            given = [x.val if isinstance(x, Literal) else known[x] for x in equation.invars]
            found = result(equation, given)
            known |= zip(equation.outvars, found if equation.primitive.multiple_results else [found])
        return [x.val if isinstance(x, Literal) else known[x] for x in jaxpr.outvars]

    def result(equation, given):
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is None:
            if equation.primitive.name == "dot_general":
                given = [jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) for x in given]
            return equation.primitive.bind(*given, **equation.params)
        run = functools.partial(evaluate, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))
        if equation.primitive.name != "scan":
            return run(*given)
        # What is carried has the same shape within the loop, what is stacked an axis less.
        same = lambda outer, within: sum(x.aval.ndim == y.aval.ndim for x, y in zip(outer, within, strict=True))
        middle, carried = same(equation.invars, inner.jaxpr.invars), same(equation.outvars, inner.jaxpr.outvars)
        fixed = middle - carried

        def step(carry, x):
            found = run(*given[:fixed], *carry, *x)
            return found[:carried], found[carried:]

        options = {name: equation.params[name] for name in ("length", "reverse")}
        last, rows = jax.lax.scan(step, given[fixed:middle], given[middle:], **options)
        return [*last, *rows]

    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    run = jax.jit(functools.partial(evaluate, closed.jaxpr, closed.consts))
    return jax.tree.unflatten(jax.tree.structure(shapes), run(*arguments))


@evidence("C11", oracle="the chunked XLA form, products rounded", code="pallas_kernels.gated_delta_rule.tpu")
@KINDS
def test_bfloat16_is_as_exact_as_xla(vector, evidence):
    """Root mean square errors against float64 at most 1.3 times those of the chunked form in the same precision."""
    given = single(inputs(vector=vector, ids=np.zeros((2, 21), np.int32)))
    given[:3] = [x.astype(jnp.bfloat16) for x in given[:3]]
    ours = simulate(with_gradients(functools.partial(kernel, ids=None)), given)
    theirs = with_rounded_products(with_gradients(functools.partial(plain, xla, ids=None)), *given)
    with jax.enable_x64(True):
        best = with_gradients(functools.partial(plain, reference, ids=None))(
            *(np.asarray(x, np.float64) for x in given)
        )
    for x, y, exact in zip(*map(jax.tree.leaves, (ours, theirs, best)), strict=True):
        found, peer = (np.sqrt(np.mean((np.asarray(a, np.float64) - exact) ** 2)) for a in (x, y))
        evidence.record(found / peer, RATIO)


def test_what_it_refuses():
    """Other dtypes; chips that are no TPU."""
    arrays = [jnp.ones((1, 4, 1, 8), dtype) for dtype in (jnp.bfloat16, jnp.bfloat16, jnp.float32)]
    call = prepare(*arrays, None, None, None, None, 1.0, 8)
    assert "not bfloat16, float32" in tpu.refusal(call)
    call = prepare(*[x[:, :0] for x in arrays[:2] * 2][:3], None, None, None, None, 1.0, 8)
    assert "empty" in tpu.refusal(call)
    with pytest.raises(NotImplementedError, match="does not run on cpu"):
        gated_delta_rule(*arrays[:2], arrays[1], jnp.ones((1, 4, 1)), implementation="tpu")
