import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.dynamic_scale import DynamicScale

from llmjax.config import ConfigError, subclasses, validate
from llmjax.train.loss_scale import Dynamic, LossScale, Static, keep_if, scale_loss, unscale
from tests.evidence import evidence

TRACE = [1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1]


@evidence("E43", oracle="flax DynamicScale on a scripted trace of overflows", code="llmjax.train.loss_scale.Dynamic")
@pytest.mark.parametrize("interval", [2, 3])
def test_dynamic_is_flax(evidence, interval):
    config = Dynamic(scale=64.0, interval=interval, growth=4.0, backoff=0.25, minimum=0.5)
    state = config.init()
    theirs = DynamicScale(4.0, 0.25, interval - 1, scale=jnp.float32(64), minimum_scale=0.5, fin_steps=jnp.int32(0))
    ours_next = jax.jit(config.next)
    for good in TRACE:
        factor = jnp.float32(1.0 if good else jnp.inf)
        scaled, gradient = jax.value_and_grad(lambda x, s, f: scale_loss(s, f * x))(jnp.float32(2.0), state, factor)
        theirs, finite, loss, expected = theirs.value_and_grad(lambda x, f: f * x)(jnp.float32(2.0), factor)
        ours = unscale(state, gradient)
        assert bool(jnp.isfinite(ours)) == bool(finite) == bool(good)
        if good:
            evidence.record(abs(float(ours - expected)) + abs(float(scaled / state.scale - loss)), 0.0)
        state = ours_next(state, jnp.isfinite(ours))
        evidence.record(abs(float(state.scale - theirs.scale)), 0.0)


@evidence("E43", oracle="PyTorch's rule: halve on overflow, double after N good steps", code="llmjax.train.loss_scale")
def test_growth_after_exactly_n_good_steps(evidence):
    config = Dynamic(scale=16.0, interval=3)
    state, scales = config.init(), []
    for good in [1, 1, 1, 1, 1, 0, 1, 1, 1]:
        state = config.next(state, jnp.bool_(good))
        scales.append(float(state.scale))
    evidence.record(np.abs(np.subtract(scales, [16, 16, 32, 32, 32, 16, 16, 16, 32])).max(), 0.0)


@evidence(
    "E43", oracle="IEEE half precision: 2.9e-8 flushes to zero, 1024 * 3e-8 does not", code="llmjax.train.loss_scale"
)
def test_static_scale_saves_small_gradients(evidence):
    config = Static(scale=1024.0)
    state = config.init()

    def loss(x, scale):  # a float16 pass whose true gradient is 2.9e-8
        half = x.astype(jnp.float16) * jnp.float16(1.0)
        return scale * (2.9e-8 * half.astype(jnp.float32))

    assert float(jax.grad(loss)(jnp.float32(1.0), 1.0)) == 0.0
    gradient = unscale(state, jax.grad(loss)(jnp.float32(1.0), state.scale))
    evidence.record(abs(float(gradient) - 2.9e-8) / 2.9e-8, 2**-11)  # half a float16 ulp
    after = config.next(config.next(state, jnp.bool_(True)), jnp.bool_(False))
    assert float(after.scale) == 1024.0


def test_the_scale_stays_within_its_bounds():
    config = Dynamic(scale=2.0, interval=1, minimum=1.0)
    low = config.next(config.next(config.init(), jnp.bool_(False)), jnp.bool_(False))
    assert float(low.scale) == 1.0
    huge = config.init()._replace(scale=jnp.float32(jnp.finfo(jnp.float32).max))
    assert float(config.next(huge, jnp.bool_(True)).scale) == float(jnp.finfo(jnp.float32).max)


class StepTest(chex.TestCase):
    """Run with and without jit."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_an_overflowing_step_is_skipped(self):
        old, new = {"w": jnp.zeros(2), "n": jnp.int32(0)}, {"w": jnp.ones(2), "n": jnp.int32(1)}
        skip = self.variant(lambda gradients: keep_if(jnp.all(jnp.isfinite(gradients["a"])), new, old))
        chex.assert_trees_all_equal(skip({"a": jnp.array([1.0, jnp.inf])}), old)
        chex.assert_trees_all_equal(skip({"a": jnp.array([1.0, jnp.nan])}), old)
        chex.assert_trees_all_equal(skip({"a": jnp.array([1.0, 65504.0], jnp.float16)}), new)

    @chex.variants(with_jit=True, without_jit=True)
    def test_gradients_are_unscaled_in_float32(self):
        state = Static(scale=4.0).init()
        result = self.variant(unscale)(state, {"w": jnp.full(2, 6e-8, jnp.float16)})
        chex.assert_type(result["w"], jnp.float32)
        chex.assert_trees_all_close(result["w"], jnp.full(2, 2.0**-26), rtol=1e-6)  # 6e-8 is 2^-24 in float16


def test_accumulated_gradients_are_unscaled_once():
    state = Static(scale=1024.0).init()
    one = jax.grad(lambda x: scale_loss(state, x))(jnp.float32(0))
    assert float(unscale(state, sum([one] * 4))) == 4.0


def test_names():
    assert sorted(subclasses(LossScale)) == ["Dynamic", "Static"]
    for kind in subclasses(LossScale).values():
        validate(kind())


@pytest.mark.parametrize(
    "field", [{"scale": 0.0}, {"growth": 1.0}, {"backoff": 1.0}, {"interval": 0}, {"minimum": 0.0}], ids=str
)
def test_bad_values(field):
    ((name, value),) = field.items()
    with pytest.raises(ConfigError, match=f"{name}={value} is"):
        validate(Dynamic(**field))
