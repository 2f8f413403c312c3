"""Heads split over the vocabulary and tokens split over devices: the numbers of one device, and no logits moved."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import linear_cross_entropy, linear_entropy, linear_kl, linear_token_losses
from tests.evidence import evidence

pytestmark = pytest.mark.devices(8)

TOKENS, WIDTH, VOCAB = 24, 8, 64


def mesh():
    return jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)


def inputs():
    keys = jax.random.split(jax.random.key(0), 6)
    return (
        jax.random.normal(keys[0], (TOKENS, WIDTH)),
        jax.random.normal(keys[1], (WIDTH, VOCAB)),
        jax.random.normal(keys[2], (TOKENS, WIDTH)),
        jax.random.normal(keys[3], (WIDTH, VOCAB)),
        jax.random.uniform(keys[4], (TOKENS,)),
        jax.random.randint(keys[5], (TOKENS,), 0, VOCAB),
    )


def cross_entropy(h, w, h2, w2, weights, targets, **options):
    options |= {"z_loss": 1e-2, "label_smoothing": 0.1, "soft_cap": 3.0}
    total, terms = linear_cross_entropy(h, w, targets, weights, chunk=5, **options)
    return total, terms.nll + terms.correct


def token_losses(h, w, h2, w2, weights, targets, **options):
    terms = linear_token_losses(h, w, targets, chunk=5, soft_cap=3.0, **options)
    return jnp.sum(jnp.sin(weights * terms.nll) + jnp.square(terms.lse)), terms.nll


def entropy(h, w, h2, w2, weights, targets, **options):
    return linear_entropy(h, w, weights, chunk=5, soft_cap=3.0, **options)


def kl(h, w, h2, w2, weights, targets, **options):
    return linear_kl(h, w, h2, w2, weights, chunk=5, soft_cap_q=3.0, **options)


def split_over_devices(function, check):
    """`function` with tokens over "data" and the vocabulary over "vocab", its sum over all tokens."""
    heads = (P("data"), P(None, "vocab"))

    def local(*arguments):
        total, tokens = function(*arguments, axis_name="vocab")
        return jax.lax.psum(total, "data"), tokens

    specs = (*heads, *heads, P("data"), P("data"))
    return jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=(P(), P("data")), check_vma=check)


@evidence("C12", oracle="the same function on one device, vocabulary whole", code="pallas_kernels.cross_entropy")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("function", [cross_entropy, token_losses, entropy, kl])
def test_a_split_vocabulary_changes_nothing(function, check, evidence):
    """Values, every token's term and all gradients, differentiated from outside `shard_map`; float32 rounding."""
    *floats, targets = inputs()

    def loss(function, *floats):
        total, tokens = function(*floats, targets)
        return 3 * total, tokens

    every = tuple(range(1, 6))
    got, expected = (
        jax.jit(jax.value_and_grad(loss, argnums=every, has_aux=True), static_argnums=0)(f, *floats)
        for f in (split_over_devices(function, check), function)
    )
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    evidence.record(max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)) / (1 + np.abs(b)))) for a, b in pairs), 2e-5)


@pytest.mark.parametrize("function", [cross_entropy, token_losses, kl])
def test_gradients_taken_inside_shard_map(function):
    """A training step whose whole body is inside: gradients come back with the layout of what they belong to."""
    *floats, targets = inputs()
    heads = (P("data"), P(None, "vocab"))

    def local(*arguments):
        *floats, targets = arguments
        loss = lambda *floats: jax.lax.psum(function(*floats, targets, axis_name="vocab")[0], "data")
        return jax.grad(loss, argnums=(0, 1))(*floats)

    step = jax.shard_map(local, mesh=mesh(), in_specs=(*heads, *heads, P("data"), P("data")), out_specs=heads)
    got = jax.jit(step)(*floats, targets)
    expected = jax.grad(lambda *floats: function(*floats, targets)[0], argnums=(0, 1))(*floats)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def partitioned(kernel_spec, token_spec, loss):
    """The compiled text of value and gradients of 512 tokens in chunks of 64, width 48, vocabulary 4096."""
    shapes = [((512, 48), jnp.float32, token_spec), ((48, 4096), jnp.float32, kernel_spec)]
    shapes += [((512,), jnp.int32, token_spec)]
    arguments = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh(), spec)) for s, t, spec in shapes]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text()


LOSSES = [
    lambda h, w, t: linear_cross_entropy(h, w, t, jnp.ones(512), chunk=64, label_smoothing=0.1)[0],
    lambda h, w, t: jnp.sum(jnp.square(linear_token_losses(h, w, t, chunk=64).nll)),
    lambda h, w, t: linear_entropy(h, w, jnp.ones(512), chunk=64)[0],
    lambda h, w, t: linear_kl(h, w, 2 * h, w, jnp.ones(512), chunk=64)[0],
]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_partitioner_gathers_no_logits(loss):
    """Under plain `jit`, kernel split over the vocabulary: no array of any device has the whole vocabulary."""
    text = partitioned(P(None, ("data", "vocab")), P(), loss)
    assert re.search(r"f32\[64,512\]", text)  # the logits of a chunk, an eighth of the vocabulary
    assert not re.search(r"\[[\d,]*\b4096\b[\d,]*\]", text)
    assert "all-gather" not in text


@pytest.mark.parametrize("loss", LOSSES)
def test_the_partitioner_divides_the_work_over_data(loss):
    """Tokens split over all devices: each makes the logits of an eighth of every chunk, and none of a whole one."""
    text = partitioned(P(), P(("data", "vocab")), loss)
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert "8,4096" in products
    assert set(products) <= {"8,4096", "8,48", "48,4096"}
