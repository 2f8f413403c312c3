"""In debug mode values outside of a scan's domain end the program; otherwise, and of absent tokens, nobody asks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels

BATCH, LENGTH, HEADS, DIM = 1, 6, 2, 4
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


KEYS = {name: normal(BATCH, LENGTH, HEADS, DIM) for name in ("query", "key", "value")}
SHARED = {name: normal(BATCH, LENGTH, 1, DIM) for name in ("B", "C")}
DECAY = -jnp.ones((BATCH, LENGTH, HEADS))
STEPS = jnp.ones((BATCH, LENGTH, HEADS))
CALLS = {
    "gated_linear_attention": KEYS | {"log_decay": DECAY},
    "gated_delta_rule": KEYS | {"log_decay": DECAY, "beta": STEPS},
    "ssd": SHARED | {"x": KEYS["value"], "dt": STEPS, "A": -jnp.ones(HEADS)},
    "selective_scan": SHARED
    | {"x": normal(BATCH, LENGTH, DIM), "dt": jnp.ones((BATCH, LENGTH, DIM)), "A": -jnp.ones((DIM, DIM))},
}
WRONG = [
    ("gated_linear_attention", "log_decay", 0.1),
    ("gated_delta_rule", "log_decay", 0.1),
    ("gated_delta_rule", "beta", -0.1),
    ("gated_delta_rule", "beta", 2.1),
    ("ssd", "dt", -0.1),
    ("ssd", "A", 0.1),
    ("selective_scan", "dt", -0.1),
    ("selective_scan", "A", 0.1),
]


def run(function, arrays, **options):
    """The outputs and the gradients of their sum, compiled."""

    def total(arrays):
        out, state = getattr(kernels, function)(**arrays, **options)
        return out.sum() + state.sum()

    result = jax.jit(jax.value_and_grad(total))(arrays)
    jax.block_until_ready(result)
    jax.effects_barrier()
    return result


def holding(name, value, arrays, token=2):
    """The arrays, one number of one of them changed."""
    place = (0,) * arrays[name].ndim if name == "A" else (0, token, *(0,) * (arrays[name].ndim - 2))
    return arrays | {name: arrays[name].at[place].set(value)}


@pytest.fixture
def debug_mode():
    with jax.debug_nans(True):
        yield


@pytest.mark.parametrize(("function", "name", "value"), WRONG)
def test_a_value_outside_ends_the_program(function, name, value, debug_mode):
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=f"{name} holds values from"):
        run(function, holding(name, value, CALLS[function]))


@pytest.mark.parametrize("function", list(CALLS))
def test_the_bounds_themselves_and_absent_tokens_may_be(function, debug_mode):
    arrays = dict(CALLS[function])
    bounds = {"log_decay": 0.0, "beta": 2.0, "dt": 0.0, "A": 0.0}
    for name in bounds.keys() & arrays.keys():
        arrays = holding(name, bounds[name], arrays)
    run(function, arrays)
    for name in ("log_decay", "beta", "dt"):
        if name in arrays:
            arrays = holding(name, -3.0 if name == "dt" else 3.0, arrays, token=4)
    run(function, arrays, segment_ids=jnp.asarray([[1, 1, 1, 1, -1, 1]]))


@pytest.mark.parametrize(("function", "name", "value"), [case for case in WRONG if case[2] == 0.1])
def test_otherwise_programs_have_no_callback(function, name, value):
    run(function, holding(name, value, CALLS[function]))
    call = jax.make_jaxpr(lambda arrays: getattr(kernels, function)(**arrays))(CALLS[function])
    assert "callback" not in str(call)
