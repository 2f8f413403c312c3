"""The TPU kernels of gated linear attention, simulated on the CPU, against the recurrence; memories start as NaN."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.gated_linear_attention import gated_linear_attention, ssd, tpu
from tests.evidence import evidence
from tests.kernels.recurrence import inputs, loop, with_gradients, worst

pytestmark = pytest.mark.mixers

TOLERANCE = 1e-6  # float32 rounding of sums over at most 128 terms, as a part of the largest number
SCALE = 0.7
LENGTH = 40
IDS = np.zeros((2, LENGTH), np.int32)
IDS[0, :3], IDS[0, 9:21], IDS[0, 21:] = -1, 1, 4
IDS[1, 16:19], IDS[1, 30:] = -1, 7
"""Segments that begin, end and cross chunks of 16; absent tokens left and within; 40 is no multiple of 16."""
ONE = np.zeros((2, LENGTH), np.int32)
SHAPES = {
    "grouped": {"heads": 4, "groups": 2, "key_dim": 8, "value_dim": 64},
    "narrow": {"heads": 8, "groups": 1, "key_dim": 8, "value_dim": 6},
    "wide": {"heads": 2, "groups": 2, "key_dim": 8, "value_dim": 130},
    "bonus": {"heads": 4, "groups": 2, "key_dim": 8, "value_dim": 64},
}
"""Two blocks of heads each, but for "narrow", whose heads all lie in one."""


@contextlib.contextmanager
def simulated(races=False):
    """Programs are for a TPU, in chunks of 16; kernels run on the CPU, and a number that was not written is NaN."""
    interpret_pallas_call.races = None
    options = pltpu.InterpretParams(detect_races=races, uninitialized_memory="nan", num_cores_or_threads=1 + races)
    with (
        mock.patch.object(chips, "target", return_value=("tpu", "TPU v5")),
        mock.patch.object(tpu, "CHUNK", 16),
        pltpu.force_tpu_interpret_mode(options),
    ):
        yield
    assert not races or not interpret_pallas_call.races.races_found


def arrays_of(name, ids=IDS):
    arrays = inputs(vector=False, ids=ids, **SHAPES[name])[:5]
    bonus = np.random.default_rng(3).standard_normal((SHAPES[name]["heads"], SHAPES[name]["key_dim"]))
    return (*arrays, bonus) if name == "bonus" else arrays


def attend(query, key, value, decay, state, bonus=None, *, ids=IDS, name="tpu"):
    options = {"initial_state": state, "bonus": bonus, "segment_ids": ids, "scale": SCALE, "chunk": 16}
    return gated_linear_attention(query, key, value, decay, implementation=name, **options)


def simulate(function, arrays, races=False, dtype=jnp.float32):
    with simulated(races):
        return jax.block_until_ready(function(*(jnp.asarray(x, dtype) for x in arrays)))


@evidence(
    "C11",
    oracle="numpy float64 loop; jax.grad of the recurrence in float64",
    code="pallas_kernels.gated_linear_attention.tpu",
)
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernels_are_the_recurrence(name, evidence):
    """Output, last state and the gradient of every input: packing, NaN in absent tokens, decays of all strengths."""
    arrays = arrays_of(name)
    with jax.enable_x64(True):
        _, expected = jax.tree.map(np.asarray, with_gradients(functools.partial(attend, name="reference"))(*arrays))
    results, gradients = simulate(with_gradients(attend), arrays, races=name == "grouped")
    exact = loop(*arrays[:5], bonus=arrays[5] if name == "bonus" else None, scale=SCALE, ids=IDS)
    evidence.record(worst(results, exact), TOLERANCE)
    evidence.record(worst(gradients, expected), TOLERANCE)
    for gradient in gradients[:4]:
        assert not np.asarray(gradient)[IDS < 0].any()


@functools.cache
def plain():
    return with_gradients(functools.partial(attend, ids=None))


DECAYS = {
    "weak": lambda decay: np.maximum(decay, -0.05),
    "mixed": lambda decay: np.where(decay < -5, 100 * decay, decay),
    "infinite": lambda decay: np.full_like(decay, -np.inf),
}


@pytest.mark.parametrize("name", DECAYS)
def test_decays_of_every_strength_keep_their_digits(name):
    """States that last for chunks; weak decays after ones of thousands; -inf forgets everything, finitely."""
    arrays = arrays_of("grouped", ONE)
    arrays = (*arrays[:3], DECAYS[name](arrays[3]), arrays[4])
    results, gradients = simulate(plain(), arrays)
    assert worst(results, loop(*arrays, scale=SCALE)) <= TOLERANCE
    with jax.enable_x64(True):
        whole = functools.partial(attend, ids=None, name="reference")
        _, expected = jax.tree.map(np.asarray, with_gradients(whole)(*arrays))
    known = slice(3) if name == "infinite" else slice(None)
    assert worst(gradients[known], expected[known]) <= TOLERANCE
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


@evidence(
    "C10", oracle="each document alone; the whole sequence at once", code="pallas_kernels.gated_linear_attention.tpu"
)
def test_packed_is_separate_and_split_is_whole(evidence):
    """Documents of 17 and 15 tokens packed, forward and backward; two halves with the state carried between them."""
    arrays = arrays_of("grouped", np.zeros((2, 32), int))
    tokens = tuple(jnp.asarray(x, jnp.float32) for x in arrays[:4])
    ids = np.repeat([[2, 5]], 2, axis=0).repeat([17, 15], axis=1)

    def packed(*tokens):
        return attend(*tokens, None, ids=ids)

    def parts(at, state, carry, *tokens):
        out, last = attend(*(x[:, :at] for x in tokens), state, ids=None)
        more, last = attend(*(x[:, at:] for x in tokens), last if carry else None, ids=None)
        return jnp.concatenate([out, more], axis=1), last

    def separate(*tokens):
        return parts(17, None, False, *tokens)

    def split(*arrays):
        return parts(16, arrays[4], True, *arrays[:4])

    for one, other, given in ((packed, separate, tokens), (split, functools.partial(attend, ids=None), arrays)):
        found, expected = (simulate(with_gradients(function), given) for function in (one, other))
        for a, b in zip(found, expected):
            evidence.record(worst(a, b), TOLERANCE)


@evidence("C10", oracle="jax.grad of the recurrence in float64", code="pallas_kernels.gated_linear_attention.ssd")
def test_ssd_multiplies_by_its_steps_on_chip(evidence):
    """Every argument's gradient; a packed sequence."""
    rng = np.random.default_rng(5)
    B, C, x, _, state, _ = inputs(vector=False, ids=IDS, **SHAPES["grouped"])
    dt, z = rng.standard_normal(x.shape[:3]), rng.standard_normal(x.shape)
    arrays = (x, dt, -rng.exponential(size=4), B, C, rng.standard_normal(4), z, np.swapaxes(state, 2, 3))

    def run(x, dt, A, B, C, D, z, state, name="tpu"):
        options = {"dt_softplus": True, "initial_state": state, "segment_ids": IDS, "implementation": name}
        return ssd(x, dt, A, B, C, D, z, **options)

    with jax.enable_x64(True):
        whole = with_gradients(functools.partial(run, name="reference"))
        expected = jax.tree.map(np.asarray, whole(*arrays))
    for a, b in zip(simulate(with_gradients(run), arrays), expected):
        evidence.record(worst(a, b), TOLERANCE)


@contextlib.contextmanager
def bfloat16_products():
    """Products of XLA's forms round their operands to bfloat16, as they do on a TPU by default."""
    exact = jax.lax.dot_general

    def rounded(a, b, *numbers, **options):
        return exact(*(jax.lax.reduce_precision(x, 8, 7) for x in (a, b)), *numbers, **options)

    jax.clear_caches()
    with mock.patch("jax._src.lax.lax.dot_general", rounded):
        yield
    jax.clear_caches()


@evidence("C10", oracle="the chunked XLA form with bfloat16 products", code="pallas_kernels.gated_linear_attention.tpu")
def test_bfloat16_errors_are_those_of_xla(evidence):
    """Root mean square errors of results and gradients against float64: at most 1.3 times XLA's."""
    query, key, value, decay, state = arrays_of("grouped", ONE)
    arrays = (*(jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)), jnp.asarray(decay, jnp.float32))

    def run(query, key, value, decay, name="tpu"):
        return attend(query, key, value, decay, jnp.asarray(state, decay.dtype), ids=None, name=name)

    found = simulate(with_gradients(run), arrays, dtype=None)
    with bfloat16_products():
        theirs = jax.block_until_ready(with_gradients(functools.partial(run, name="xla"))(*arrays))
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays]
        exact = jax.tree.map(np.asarray, with_gradients(functools.partial(run, name="reference"))(*wide))
    rms = lambda x, y: np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2))
    for mine, other, true in zip(*map(jax.tree.leaves, (found, theirs, exact)), strict=True):
        assert mine.dtype == other.dtype
        evidence.record(rms(mine, true), 1.3 * rms(other, true))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"log_decay": (1, 4, 2, 8), "dtype": jnp.float16}, "all in bfloat16 or all in float32, not float16"),
        ({"key": (1, 4, 2, 520), "query": (1, 4, 2, 520)}, "dims must be at most 512"),
        ({"dtype": jnp.float16}, "takes bfloat16 or float32, not float16"),
    ],
)
def test_refusals_say_why(change, reason):
    dtype = change.get("dtype", jnp.float32)
    shapes = {"query": (1, 4, 2, 8), "key": (1, 4, 2, 8), "value": (1, 4, 2, 8), "log_decay": (1, 4, 2)} | change
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items() if name != "dtype"}
    with simulated(), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(gated_linear_attention, implementation="tpu"), **arrays)
