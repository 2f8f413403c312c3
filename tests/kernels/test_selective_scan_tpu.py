"""The TPU kernels of the selective scan, interpreted on the CPU, against the sequential definition, laws and loops."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.selective_scan import selective_scan, tpu, tpu_backward, tpu_blocks
from tests.evidence import evidence
from tests.kernels.recurrence import with_gradients, worst

pytestmark = pytest.mark.mixers

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
CODE = "pallas_kernels.selective_scan.tpu"
TOLERANCE = 1e-6  # float32 sums over at most 600 terms in another order, as a part of the largest number
LENGTH = 41  # three blocks of 16 tokens, the last one not full


@contextlib.contextmanager
def interpreted():
    """Programs are for a TPU; its kernels become XLA programs for the CPU."""
    with (
        mock.patch.object(chips, "target", return_value=("tpu", "TPU v5")),
        mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)),
    ):
        yield


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """16 tokens in two groups, and 128 channels, so that there are several of all."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (tpu, tpu_backward, tpu_blocks):
            patch.setattr(module, "TOGETHER", 8)
        patch.setattr(tpu, "BLOCK", 16)
        patch.setattr(tpu, "STATES", 8 * 128)
        yield


def arrays(batch=2, length=LENGTH, width=500, groups=2, state=5, dtype=np.float32):
    """Every argument in order."""
    rng = np.random.default_rng(0)
    x, dt, z = rng.standard_normal((3, batch, length, width))
    B, C = rng.standard_normal((2, batch, length, groups, state))
    A, (D, bias) = -rng.uniform(0.1, 4, (width, state)), rng.standard_normal((2, width))
    initial = rng.standard_normal((batch, width, state))
    return tuple(jnp.asarray(v, dtype) for v in (x, dt, A, B, C, D, z, bias, initial))


def segments(batch=2, length=LENGTH):
    """Documents, absent tokens among them; some begin where a block does."""
    ids = np.sort(np.random.default_rng(1).integers(0, 4, (batch, length)), axis=1)
    ids[0, 16:], ids[:, 3::9] = ids[0, 16:] + 4, -1
    return ids.astype(np.int32)


def run(name, ids=None, **options):
    return lambda *arrays: selective_scan(**dict(zip(NAMES, arrays)), segment_ids=ids, implementation=name, **options)


def simulated(function, *arrays):
    with interpreted():
        return jax.block_until_ready(function(*arrays))


CASES = {
    "packed": (arrays(), {"ids": segments(), "dt_softplus": True}),
    "no_softplus": (tuple(abs(v) if i in (1, 7) else v for i, v in enumerate(arrays(1, width=128, groups=1))), {}),
    "bare_reverse": (arrays(1, 32, 256, 1, 8)[:5], {"dt_softplus": True, "reverse": True}),
}


@evidence("C09", oracle="jax.grad of lax.scan over tokens, float32", code=CODE)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_definition(name, evidence):
    """Outputs, last state and the gradient of every argument; what absent tokens hold is NaN."""
    given, options = CASES[name]
    if "ids" in options:
        absent = options["ids"] < 0
        given = tuple(v.at[absent].set(jnp.nan) if i in (0, 1, 3, 4, 6) else v for i, v in enumerate(given))
    expected = with_gradients(run("reference", **options))(*given)
    found = simulated(with_gradients(run("tpu", **options)), *given)
    for ours, theirs in zip(found, expected):
        evidence.record(worst(ours, theirs), TOLERANCE)


@evidence("C09", oracle="law: parts with carried state, documents apart", code=CODE)
def test_parts_and_packing(evidence):
    """A cut sequence is the whole one, two documents in a row are two rows; results and gradients."""
    x, dt, A, B, C = arrays(2, 24, 128, 1, 4)[:5]
    dt = jnp.logaddexp(dt, 0)
    scan = functools.partial(selective_scan, implementation="tpu")

    def whole(x, dt, A, B, C):
        y, final = scan(x, dt, A, B, C)
        return y, final[1:]

    def parts(x, dt, A, B, C):
        def part(state, tokens):
            x, dt, B, C = tokens
            y, state = scan(x, dt, A, B, C, initial_state=state)
            return state, y

        cut = [jnp.moveaxis(v.reshape(2, 2, 12, *v.shape[2:]), 1, 0) for v in (x, dt, B, C)]
        state, y = jax.lax.scan(part, jnp.zeros((2, *A.shape)), cut)
        return jnp.moveaxis(y, 0, 1).reshape(x.shape), state[1:]

    def packed(x, dt, A, B, C):
        x, dt, B, C = (v.reshape(1, 48, *v.shape[2:]) for v in (x, dt, B, C))
        y, state = scan(x, dt, A, B, C, segment_ids=np.arange(2).repeat(24)[None])
        return y.reshape(2, 24, -1), state

    expected, *others = (
        jax.tree.leaves(simulated(with_gradients(form), x, dt, A, B, C)) for form in (whole, parts, packed)
    )
    for other in others:
        evidence.record(worst(other, expected), TOLERANCE)


@evidence("C09", oracle="float32 definition of the rounded inputs; XLA's own error in bfloat16", code=CODE)
def test_bfloat16_errors_are_those_of_xla(evidence):
    """Root mean square errors of results and gradients: each at most 1.3 times those of the chunked XLA form."""
    rounded = arrays(1, 32, 128, 1, 8, dtype=jnp.bfloat16)
    exact, mine, theirs = (
        jax.tree.leaves(simulated(with_gradients(run(name, dt_softplus=True)), *given))
        for name, given in (
            ("reference", [v.astype(jnp.float32) for v in rounded]),
            ("tpu", rounded),
            ("xla", rounded),
        )
    )
    rms = lambda x, y: np.sqrt(np.mean((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2))
    for x, y, z in zip(mine, theirs, exact, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        evidence.record(rms(x, z), max(1.3 * rms(y, z), TOLERANCE * np.abs(z).max()))


@evidence("C09", oracle="the simulation of memories: a race, or a number never written, fails", code=CODE)
def test_memories_and_races(evidence):
    """Two blocks of tokens, four of channels, two cores, time reversed; every number that was not written is NaN."""
    options = {"ids": segments(1, 32), "dt_softplus": True, "reverse": True}
    given = arrays(1, 32, 512, 1, 4)
    expected = with_gradients(run("reference", **options))(*given)
    interpret_pallas_call.races = None
    memory = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    with (
        mock.patch.object(chips, "target", return_value=("tpu", "TPU v5")),
        pltpu.force_tpu_interpret_mode(memory),
    ):
        found = jax.block_until_ready(with_gradients(run("tpu", **options))(*given))
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found
    for ours, theirs in zip(found, expected):
        evidence.record(worst(ours, theirs), TOLERANCE)


def test_blocks_fit_the_shapes(monkeypatch):
    """Whole tiles that cover the shapes; divisors of the channels; an even count of blocks where there is one."""
    monkeypatch.setattr(tpu, "BLOCK", 128)
    monkeypatch.setattr(tpu, "STATES", 2**14)
    monkeypatch.setattr(tpu, "TOGETHER", 16)
    for length, width, groups, state in ((1, 6, 2, 3), (2048, 4096, 1, 16), (1000, 5120, 1, 16), (77, 1536, 4, 200)):
        x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
        B = jax.ShapeDtypeStruct((1, length, groups, state), jnp.float32)
        plan = tpu.plan_of(tpu.Tokens(x, x, B, B, None, None), False, False)
        assert plan.length % plan.block == plan.block % 16 == plan.state % 8 == plan.channels % 128 == 0
        assert 0 <= plan.length - length < 16 * plan.length // plan.block
        assert 0 <= plan.width - width < 128 * groups
        assert np.prod(plan.grid[1:2] + plan.grid[3:]) * plan.channels == plan.width
        assert plan.channels * plan.state <= max(2**14, 128 * plan.state)
    assert (plan.block, plan.channels) == (16, 128)


def test_refusals_say_why():
    given = dict(zip(NAMES, arrays(1, 4, 128, 1, 4)))
    with pytest.raises(NotImplementedError, match="does not run on cpu"):
        selective_scan(**given, implementation="tpu")
    with interpreted():
        with pytest.raises(NotImplementedError, match="takes bfloat16 and float32, and B is float16"):
            selective_scan(**given | {"B": given["B"].astype(jnp.float16)}, implementation="tpu")
        wide = {name: jnp.zeros((1, 4, 1, 300)) for name in "BC"} | {"A": jnp.zeros((128, 300)), "initial_state": None}
        with pytest.raises(NotImplementedError, match="takes at most 256 states a channel, not 300"):
            selective_scan(**given | wide, implementation="tpu")
