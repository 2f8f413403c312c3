"""Steps of decoding: on a TPU scans of a few tokens are plain XLA unless a kernel is asked for, and sums stay sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels.dispatch import FEW
from pallas_kernels.gated_linear_attention import spans
from tests.kernels.simulated import simulated_tpu


def arrays_of(function, length):
    keys = {name: jnp.ones((1, length, 2, 16)) for name in ("query", "key", "value")}
    shared = {name: jnp.ones((1, length, 1, 16)) for name in ("B", "C")}
    rows = jnp.ones((1, length, 2))
    wide = jnp.ones((1, length, 16))
    return {
        "gated_linear_attention": keys | {"log_decay": -rows},
        "gated_delta_rule": keys | {"beta": rows},
        "ssd": shared | {"x": keys["value"], "dt": rows, "A": -jnp.ones(2)},
        "selective_scan": shared | {"x": wide, "dt": wide, "A": -jnp.ones((16, 16))},
    }[function]


@pytest.mark.parametrize("function", ["gated_linear_attention", "gated_delta_rule", "ssd", "selective_scan"])
def test_kernels_are_for_more_than_a_step(function):
    def kernel(length, **options):
        with simulated_tpu():
            call = jax.make_jaxpr(lambda arrays: getattr(kernels, function)(**arrays, **options))
            return "pallas_call" in str(call(arrays_of(function, length)))

    assert [kernel(length) for length in (1, FEW, FEW + 1)] == [False, False, True]
    assert kernel(1, implementation="tpu")


@pytest.mark.parametrize("length", [1, 2, spans.FEW, spans.FEW + 1])
@pytest.mark.parametrize("exclusive", [False, True])
def test_sums_of_few_rows_are_those_of_many(length, exclusive):
    rng = np.random.default_rng(length)
    decay = -rng.exponential(size=(3, length, 2))
    decay[0, length // 2, 0] = -np.inf
    ahead = np.stack([decay[:, : i + (not exclusive)].sum(1) for i in range(length)], axis=1)
    behind = np.stack([decay[:, i + 1 :].sum(1) for i in range(length)], axis=1)
    np.testing.assert_allclose(spans.up_to(jnp.asarray(decay, jnp.float32), exclusive), ahead, rtol=1e-6)
    np.testing.assert_allclose(spans.after(jnp.asarray(decay, jnp.float32)), behind, rtol=1e-6)
