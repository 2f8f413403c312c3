import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.config import ConfigError, validate
from llmjax.train.ema import Ema


def series(count=6):
    rng = np.random.default_rng(0)
    return [{"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "b": jnp.float32(i)} for i in range(count)]


class EmaTest(chex.TestCase):
    """Run with and without jit."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_debiased_is_optax(self):
        config, oracle = Ema(decay=0.8, debias=True), optax.ema(0.8, debias=True)
        update = self.variant(config.update)
        state, reference = config.init(series()[0]), oracle.init(series()[0])
        for params in series():
            state = update(state, params)
            expected, reference = oracle.update(params, reference)
            chex.assert_trees_all_close(config.params(state), expected, atol=1e-6)  # ulps of values up to 5

    @chex.variants(with_jit=True, without_jit=True)
    def test_plain_is_a_weighted_sum(self):
        config, start = Ema(decay=0.8, debias=False), {"w": jnp.ones((3, 2)), "b": jnp.float32(7)}
        update, state = self.variant(config.update), config.init(start)
        for params in series():
            state = update(state, params)
        count = len(series())
        weights = [0.8**count] + [0.2 * 0.8 ** (count - 1 - i) for i in range(count)]
        assert sum(weights) == pytest.approx(1)
        expected = jax.tree.map(lambda *p: sum(w * x for w, x in zip(weights, p)), start, *series())
        chex.assert_trees_all_close(config.params(state), expected, atol=1e-6)


def test_one_debiased_update_is_the_parameters():
    (params,) = series(1)
    config = Ema(decay=0.999)
    # 1 - 0.999 has only 16 significant bits left in float32: both its uses round alike to 1e-4
    chex.assert_trees_all_close(config.params(config.update(config.init(params), params)), params, rtol=1e-4)


@pytest.mark.parametrize("debias", [True, False])
def test_the_average_is_float32_and_its_own_copy(debias):
    params = {"w": jnp.ones(4, jnp.bfloat16), "v": jnp.ones(4)}
    config = Ema(debias=debias)
    state = config.init(params)
    params["v"].delete()  # what donating the parameters does
    state = config.update(state, {"w": params["w"], "v": jnp.ones(4)})
    chex.assert_type(jax.tree.leaves(state.average), jnp.float32)
    chex.assert_tree_all_finite(state)


def test_small_steps_are_not_lost_to_rounding():
    # 1e-4 of a step of 1e-2 is far below the bfloat16 spacing at 1 (8e-3) and above float32's (1e-7)
    config = Ema(decay=0.9999, debias=False)
    state = config.init({"w": jnp.bfloat16(1.0)})
    state = config.update(state, {"w": jnp.bfloat16(1.0078125)})
    assert float(state.average["w"]) == pytest.approx(1 + 0.0078125e-4, abs=1.2e-7)  # an ulp
    assert float(state.average["w"]) > 1


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_bad_decay(decay):
    with pytest.raises(ConfigError, match=f"decay={decay} is not in"):
        validate(Ema(decay=decay))
