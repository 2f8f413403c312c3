"""Gated linear attention with one decay a key dimension on a simulated TPU, against the recurrence."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule import tpu
from pallas_kernels.gated_linear_attention import gated_linear_attention, tpu_vector
from pallas_kernels.gated_linear_attention.call import prepare, with_gained_values
from tests.evidence import evidence
from tests.kernels.recurrence import inputs, loop, with_gradients, worst
from tests.kernels.simulated import simulated_tpu

pytestmark = pytest.mark.mixers

TOLERANCE = 1e-6  # float32 rounding of sums over at most 128 terms, as a part of the largest number
LENGTH, SCALE = 40, 0.7
IDS = np.zeros((2, LENGTH), np.int32)
IDS[0, :3], IDS[0, 9:21], IDS[0, 21:] = -1, 1, 4
IDS[1, 16:19], IDS[1, 30:] = -1, 7
"""Segments that begin, end and cross chunks of 16; absent tokens left and within; 40 is no multiple of 16."""
ONE = np.zeros((2, LENGTH), np.int32)
BONUS = np.random.default_rng(3).standard_normal((4, 8))


@functools.cache
def arrays(packed):
    return inputs(vector=True, ids=IDS if packed else ONE, groups=4, key_dim=8, value_dim=8)[:5]


def attend(query, key, value, decay, state, bonus=None, *, ids=IDS, name="tpu"):
    options = {"initial_state": state, "bonus": bonus, "segment_ids": ids, "scale": SCALE, "chunk": 16}
    return gated_linear_attention(query, key, value, decay, implementation=name, **options)


def simulate(function, given):
    with mock.patch.object(tpu, "CHUNK", 16), simulated_tpu():
        return jax.block_until_ready(function(*given))


@evidence(
    "C11",
    oracle="numpy float64 loop; jax.grad of the recurrence in float64",
    code="pallas_kernels.gated_linear_attention.tpu_vector",
)
@pytest.mark.parametrize("name", ["GLA", "RWKV-6"])
def test_the_kernels_are_the_recurrence(name, evidence):
    """Output, last state and the gradient of every input: packing, NaN in absent tokens, decays of all strengths."""
    bonus = () if name == "GLA" else (BONUS,)
    given = (*arrays(True), *bonus)
    with jax.enable_x64(True):
        _, expected = jax.tree.map(np.asarray, with_gradients(functools.partial(attend, name="reference"))(*given))
    results, gradients = simulate(with_gradients(attend), [jnp.asarray(x, jnp.float32) for x in given])
    evidence.record(
        worst(results, loop(*given[:5], bonus=bonus[0] if bonus else None, scale=SCALE, ids=IDS)), TOLERANCE
    )
    evidence.record(worst(gradients, expected), TOLERANCE)
    for gradient in gradients[:4]:
        assert not np.asarray(gradient)[IDS < 0].any()


@evidence("C11", oracle="the whole sequence at once", code="pallas_kernels.gated_linear_attention.tpu_vector")
@pytest.mark.parametrize("bonus", [None, jnp.asarray(BONUS, jnp.float32)], ids=["GLA", "RWKV-6"])
def test_a_carried_state_continues(bonus, evidence):
    """Two parts of 17 and 23 tokens with the state between them, forward and backward."""
    given = [jnp.asarray(x, jnp.float32) for x in arrays(False)]

    def parts(*tokens, state):
        out, last = attend(*(x[:, :17] for x in tokens), state, bonus, ids=None)
        more, last = attend(*(x[:, 17:] for x in tokens), last, bonus, ids=None)
        return jnp.concatenate([out, more], axis=1), last

    split = simulate(with_gradients(lambda *x: parts(*x[:4], state=x[4])), given)
    whole = simulate(with_gradients(lambda *x: attend(*x, bonus, ids=None)), given)
    for one, other in zip(split, whole):
        evidence.record(worst(one, other), TOLERANCE)


@evidence("C11", oracle="the recurrence in float64", code="pallas_kernels.gated_linear_attention.tpu_vector")
def test_bfloat16_errors_are_a_few_roundings(evidence):
    """Root mean square errors against float64: at most those of four roundings, of the operands of two products."""
    query, key, value, decay, state = arrays(False)
    given = (*(jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)), jnp.asarray(decay, jnp.float32))

    def run(query, key, value, decay, name="tpu"):
        return attend(query, key, value, decay, jnp.asarray(state, decay.dtype), ids=None, name=name)

    found = simulate(with_gradients(run), given)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in given]
        exact = jax.tree.map(np.asarray, with_gradients(functools.partial(run, name="reference"))(*wide))
    for mine, true in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        rounding = 2**-9 * np.sqrt(np.mean(true**2))
        evidence.record(np.sqrt(np.mean((np.asarray(mine, np.float64) - true) ** 2)), 4 * rounding)


def test_a_gain_multiplies_what_is_written():
    """Forward, and its gradient."""
    query, key, value, decay, state = (jnp.asarray(x, jnp.float32) for x in arrays(False))
    gain = jnp.asarray(np.random.default_rng(4).standard_normal(value.shape[:3]), jnp.float32)

    def run(gain, change):
        call = prepare(query, key, value, decay, None, state, None, SCALE, 16)._replace(gain=gain)
        return tpu_vector.run(change(call))

    on_chip, before = (
        simulate(with_gradients(functools.partial(run, change=change)), [gain])
        for change in (lambda call: call, with_gained_values)
    )
    for one, other in zip(on_chip, before):
        assert worst(one, other) <= TOLERANCE
