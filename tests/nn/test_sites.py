"""Sites: reading, patching and gradients under jit, scan and vmap, against finite differences and runs by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.sites import intervene

MODEL = Decoder(vocab=17, d_model=16, layers=3, pattern=(Block(),))
TOKENS = jnp.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: a * 5, MODEL.init(jax.random.key(0)))


def run(params, interventions=None, unroll=3):
    import dataclasses

    variables = {"params": params}
    if interventions is not None:
        variables["interventions"] = interventions
    model = dataclasses.replace(MODEL, unroll=unroll)
    (out, _), captured = model.build().apply(variables, TOKENS, mutable=["sites"])
    return out, captured["sites"]


def at(**edits):
    return {"blocks": {"0": {"resid_post": edits}}}


@pytest.mark.parametrize("unroll", [1, 2, 3])
def test_sites_stay_stacked_however_far_the_scan_is_unrolled(params, unroll):
    out, sites = jax.jit(run, static_argnames="unroll")(params, unroll=unroll)
    assert sites["blocks"]["0"]["resid_post"].shape == (3, 2, 5, 16)
    np.testing.assert_array_equal(sites["blocks"]["0"]["resid_post"][:2], sites["blocks"]["0"]["resid_pre"][1:])
    np.testing.assert_array_equal(sites["blocks"]["0"]["resid_pre"][0], sites["embedded"])
    chex.assert_trees_all_close(out, sites["final"] @ params["head"]["kernel"], atol=1e-5)


def test_the_empty_edit_is_the_identity(params):
    zeros = jnp.zeros((3, 2, 5, 16))
    edits = at(mask=jnp.zeros((3, 1, 1, 1), bool), value=zeros, add=zeros, stop=jnp.zeros((3, 1, 1, 1), bool))
    np.testing.assert_array_equal(jax.jit(run)(params, edits)[0], jax.jit(run)(params)[0])


def test_replacing_the_last_layer_sets_the_logits(params):
    """What follows the last site is norm and head alone, so their result on the new value is the whole answer."""
    value = jax.random.normal(jax.random.key(1), (3, 2, 5, 16))
    mask = jnp.asarray([False, False, True])[:, None, None, None]
    out, _ = jax.jit(run)(params, at(mask=mask, value=value))
    root = jnp.sqrt(jnp.mean(value[2] ** 2, axis=-1, keepdims=True) + 1e-6)
    expected = value[2] / root * params["norm"]["scale"] @ params["head"]["kernel"]
    chex.assert_trees_all_close(out, expected, atol=1e-5)


def test_patching_a_run_into_itself_one_layer_down_moves_only_later_layers(params):
    clean = jax.jit(run)(params)[1]["blocks"]["0"]["resid_post"]
    add = jnp.zeros((3, 1, 1, 16)).at[1, ..., 0].set(0.5)
    edited = jax.jit(run)(params, at(add=add))[1]["blocks"]["0"]["resid_post"]
    np.testing.assert_array_equal(edited[0], clean[0])
    chex.assert_trees_all_close(edited[1], clean[1] + add[1], atol=1e-6)
    assert jnp.any(edited[2] != clean[2])


def test_gradient_through_a_site_is_the_finite_difference(params):
    def loss(add):
        return jnp.sum(jnp.sin(run(params, at(add=add))[0]))

    start = jnp.zeros((3, 2, 5, 16))
    gradient = jax.jit(jax.grad(loss))(start)
    direction = jax.random.normal(jax.random.key(2), start.shape)
    step = 1e-2
    difference = (loss(step * direction) - loss(-step * direction)) / (2 * step)
    # Of a central difference in float32, truncation and rounding are each below half a percent here.
    np.testing.assert_allclose(jnp.vdot(gradient, direction), difference, rtol=1e-2)


def test_stop_cuts_the_gradient_and_not_the_value(params):
    def loss(p, stop):
        return jnp.sum(jnp.sin(run(p, at(stop=stop))[0]))

    cut = jnp.asarray([False, True, False])[:, None, None, None]
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, cut)
    free_value, free = jax.jit(jax.value_and_grad(loss))(params, jnp.zeros_like(cut))
    np.testing.assert_array_equal(value, free_value)
    kernel, free_kernel = (g["blocks"]["0"]["mlp"]["up"]["kernel"] for g in (gradient, free))
    np.testing.assert_array_equal(kernel[:2], 0.0)
    assert jnp.all(jnp.any(free_kernel != 0, axis=(1, 2)))
    assert jnp.any(kernel[2] != 0)


@pytest.mark.slow
def test_vmap_over_edits_equals_one_run_each(params):
    value = jnp.zeros((3, 2, 5, 16))
    masks = jnp.eye(3, dtype=bool)[:, :, None, None, None]
    sweep = jax.jit(jax.vmap(lambda mask: run(params, at(mask=mask, value=value))[0]))(masks)
    for layer in range(3):
        chex.assert_trees_all_close(sweep[layer], run(params, at(mask=masks[layer], value=value))[0], atol=1e-5)


def test_edits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="mask with value, add, stop"):
        intervene(jnp.zeros(3), {"mask": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="scale"):
        intervene(jnp.zeros(3), {"scale": jnp.ones(3)})
