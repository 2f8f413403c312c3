import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from llmjax.config import ConfigError, validate
from llmjax.train.loss_scale import Dynamic
from llmjax.train.optimizers import SGD, AdamW, set_learning_rate
from llmjax.train.precision import Precision, dtypes
from llmjax.train.schedules import Constant
from tests.evidence import evidence

HALF = [Precision("bfloat16"), Precision("float16", loss_scale=Dynamic())]


def loss(precision, params, x):
    """A step's forward pass under a policy; also what dtypes the activations have."""
    cast, x = precision.cast_compute((params, x))
    hidden = x @ cast["kernel"] + cast["bias"]
    logits = hidden.astype(jnp.float32)
    return jnp.sum(logits**2), {"hidden": hidden, "logits": logits}


@evidence("E42", oracle="dtypes of a jitted training step read off its result", code="llmjax.train.precision.dtypes")
@pytest.mark.parametrize("precision", [Precision(), *HALF], ids=lambda p: p.compute)
def test_dtype_audit_of_a_step(evidence, precision):
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}
    tx = AdamW(schedule=Constant(), no_decay="").build(params)

    @jax.jit
    def step(params, state, x):
        gradients, activations = jax.grad(lambda p: loss(precision, p, x), has_aux=True)(params)
        updates, state = tx.update(gradients, set_learning_rate(state, 1e-3), params)
        return optax.apply_updates(params, updates), state, gradients, activations

    new, state, gradients, activations = step(params, tx.init(params), jnp.ones((2, 3)))
    floats = {path: dtype for path, dtype in dtypes((new, state, gradients)).items() if dtype != "int32"}
    assert dtypes(new) == {"bias": "float32", "kernel": "float32"}
    assert dtypes(activations) == {"hidden": precision.compute, "logits": "float32"}
    evidence.record(sum(dtype != "float32" for dtype in floats.values()), 0)


@evidence(
    "E42",
    oracle="arithmetic: 100 steps of 1e-4, each below half an ulp of the compute dtype",
    code="llmjax.train.precision",
)
@pytest.mark.parametrize("precision", HALF, ids=lambda p: p.compute)
def test_updates_below_an_ulp_survive_in_the_masters(evidence, precision):
    # At 1 the spacing is 2^-7 (bfloat16) and 2^-10 (float16); a step of 1e-4 rounds away in both.
    master, naive = {"w": jnp.float32(1.0)}, {"w": jnp.asarray(1.0, precision.compute)}
    tx = SGD(schedule=Constant(), momentum=0.0, clip=None).build(master)
    state = set_learning_rate(tx.init(master), 1e-4)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: -precision.cast_compute(p)["w"].astype(jnp.float32))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        master, state = step(master, state)
        naive, _ = step(naive, state)
    assert float(naive["w"]) == 1.0
    evidence.record(abs(float(master["w"]) - 1.01), 100 * 6e-8)  # half a float32 ulp a step


def test_casting_leaves_integers_and_keys_alone():
    tree = {"w": jnp.ones(2), "tokens": jnp.arange(3), "mask": jnp.array([True]), "key": jax.random.key(0)}
    cast = Precision("bfloat16").cast_compute(tree)
    assert dtypes(cast) == {"key": "key<fry>", "mask": "bool", "tokens": "int32", "w": "bfloat16"}
    assert dtypes(jax.eval_shape(lambda: cast)) == dtypes(cast)
    chex.assert_trees_all_equal(Precision().cast_compute(tree), tree)
    assert dtypes(Precision().cast_compute(cast))["w"] == "float32"


def test_gradients_through_the_cast_are_those_of_the_rounded_parameters():
    x = jnp.array([1.0, 2.0, 3.0])
    gradient = jax.grad(lambda w: jnp.sum(Precision("bfloat16").cast_compute(w).astype(jnp.float32) * x))(jnp.ones(3))
    chex.assert_type(gradient, jnp.float32)
    chex.assert_trees_all_equal(gradient, x)


def test_float16_needs_a_loss_scale():
    validate(HALF[1])
    with pytest.raises(ConfigError, match=r"loss_scale=None leaves float16 gradients .* use Dynamic\(\)"):
        validate(Precision("float16"))
