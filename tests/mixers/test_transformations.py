"""Every sequence mixer under what training does to it: half precision, vmap, scan, remat, eight devices."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from llmjax.nn.additive_attention import AdditiveAttention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.hyena import Hyena
from llmjax.nn.linformer import Linformer
from llmjax.nn.lsh_attention import LSHAttention
from llmjax.nn.mask_bigbird import BigBird
from llmjax.nn.mask_moba import MoBA
from llmjax.nn.memorizing import MemorizingAttention
from llmjax.parallel.mesh import MeshConfig, batch_sharding, shardings
from tests.flops import flops
from tests.mixers.cases import CASES, CAUSAL, D_MODEL, INIT, apply, enter, params_of

pytestmark = pytest.mark.devices(8)
EVERY = pytest.mark.parametrize("name", list(CASES))
X = np.random.default_rng(5).standard_normal((8, 12, D_MODEL)).astype(np.float32)


def loss(mixer, params, x):
    """A smooth scalar of the output, and the output."""
    y = apply(mixer, params, x)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y


@functools.partial(jax.jit, static_argnums=0)
def graded(mixer, params, x):
    """Output and gradients of parameters and input."""
    (_, y), gradients = jax.value_and_grad(loss, (1, 2), has_aux=True)(mixer, params, x)
    return y, gradients


@functools.cache
def single(name):
    """The same on one device in float32."""
    return jax.device_get(graded(CASES[name], params_of(CASES[name]), X))


@EVERY
def test_bfloat16_stays_near_float32(name):
    """8 bits of mantissa through a few products and a recurrence: 5 % of the output's root mean square."""
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params_of(CASES[name]))
    y, gradients = graded(CASES[name], half, jnp.asarray(X, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected, _ = single(name)
    error = np.asarray(y, np.float32) - expected
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(expected**2))
    chex.assert_tree_all_finite(gradients)


@EVERY
def test_vmap_is_a_loop(name):
    mixer, params = CASES[name], params_of(CASES[name])
    y = jax.jit(jax.vmap(lambda x: apply(mixer, params, x)))(X.reshape(4, 2, *X.shape[1:]))
    expected, _ = single(name)
    np.testing.assert_allclose(y.reshape(X.shape), expected, atol=3e-5 * np.abs(expected).max())


@EVERY
def test_eight_devices_are_one(name):
    """Batch over data and fsdp, parameters over fsdp and tensor; sums over devices are in another order."""
    mixer, params = CASES[name], params_of(CASES[name])
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    context, _ = enter(X[..., 0], None, None, None)
    module = mixer.build(D_MODEL, 2, INIT, "mixer")
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), X, context)).get("params", {})
    places = shardings(nn.get_partition_spec(boxed), params, mesh)
    placed = jax.tree.map(jax.device_put, params, places)
    x = jax.device_put(X, batch_sharding(mesh))
    assert x.addressable_shards[0].data.size * 4 == x.size
    leaves = jax.tree.leaves(placed)
    assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in leaves) or not leaves
    with jax.set_mesh(mesh):
        got = jax.device_get(graded(mixer, placed, x))
    for one, two in zip(got, single(name), strict=True):  # the output, then the gradients
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(two))
        chex.assert_trees_all_close(one, two, atol=5e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_scanned_stack_is_the_stack_laid_out(name):
    """Also with the layers recomputed in the backward pass."""
    tokens = jax.random.randint(jax.random.key(7), (2, 12), 0, 29)

    def gradients(params=None, **changes):
        block = Block(mixer=CASES[name], mlp=None)
        model = Decoder(vocab=29, d_model=D_MODEL, layers=3, pattern=(block,), initializer=INIT, **changes)
        params = model.init(jax.random.key(0)) if params is None else params
        module = model.build()
        run = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, tokens)[0]))))
        return params, run(params)

    params, expected = gradients(unroll=3)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    _, scanned = gradients(params, unroll=1, remat="full")
    chex.assert_trees_all_close(scanned, expected, atol=1e-4 * scale, rtol=0)


def sized(mixer, length):
    """The mixer with what its config has to say about long rows said for this length."""
    if isinstance(mixer, Linformer):
        return dataclasses.replace(mixer, length=length)
    mask = getattr(mixer, "mask", None)
    if isinstance(mask, BigBird):
        return dataclasses.replace(mixer, mask=dataclasses.replace(mask, length=length))
    if isinstance(mask, MoBA):  # every token meets the mean of every block
        return dataclasses.replace(mixer, mask=dataclasses.replace(mask, size=length // 16))
    return mixer


def shapes_at(mixer, length):
    """The mixer's function and abstract arguments of one sequence of `length` tokens."""
    x = jax.ShapeDtypeStruct((1, length, D_MODEL), jnp.float32)
    context, _ = enter(jnp.zeros((1, 8), jnp.int32), None, None, None)
    module = mixer.build(D_MODEL, 2, INIT, "mixer")
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, D_MODEL)), context))
    return lambda params, x: apply(mixer, params, x), meta.unbox(params).get("params", {}), x


@EVERY
def test_cost_grows_as_the_config_says(name):
    """Twice the length: the counted FLOPs grow as 2 `matmul_params` + `mixing_flops` do, to 20 % at 2k to 4k."""
    mixer = CASES[name]
    try:
        counted = [flops(*shapes_at(mixer, length)) for length in (2048, 4096)]
    except ValueError:
        pytest.skip("its kernel decides at run time which tiles it visits")
    said = [n * (2 * mixer.matmul_params(D_MODEL) + mixer.mixing_flops(D_MODEL, n)) for n in (2048, 4096)]
    assert counted[1] / counted[0] == pytest.approx(said[1] / said[0], rel=0.2)


@pytest.mark.parametrize("name", [name for name, mixer in CASES.items() if not isinstance(mixer, AdditiveAttention)])
def test_memory_is_linear_in_length(name):
    """No `[length, length]` array: temporary bytes grow about as the length does, from 1k to 4k.

    Additive attention has one by its nature: a small network for each pair of tokens.
    """

    def bytes_at(length):
        run, *arguments = shapes_at(sized(CASES[name], length), length)
        return jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    short, long = bytes_at(1024), bytes_at(4096)
    assert long < 6 * max(short, 2**16)


@EVERY
def test_state_of_linear_mixers_does_not_grow(name):
    """A mixer whose work per token does not depend on the length keeps no tokens; but some search what they keep."""
    mixer = CASES[name]
    searching = isinstance(mixer, LSHAttention | MemorizingAttention) or hasattr(mixer, "mask")
    if searching or mixer.sees_future() or isinstance(mixer, Hyena):
        pytest.skip("keeps keys and values, or inputs")
    work = [mixer.mixing_flops(D_MODEL, length) for length in (2**14, 2**15)]
    state = [mixer.state_bytes(D_MODEL, length, jnp.bfloat16) for length in (2**14, 2**15)]
    assert (state[0] == state[1]) == (work[1] < 1.1 * work[0])
