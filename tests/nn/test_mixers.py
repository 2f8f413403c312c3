"""The laws that every sequence mixer keeps. Tolerances are of float32 sums, relative to the largest value.

Causality is exact: the same executable is run twice. Frequency-domain forms mix rounding errors of all tokens, so
theirs is 1e-5 of the maximum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.parallel.mesh import RULES
from tests.mixers.cases import CASES, CAUSAL, D_MODEL, INIT, apply, enter, forms, forward, in_parts, params_of

QUICK = ("Attention", "Attention-1", "mask-Window", "LinearAttention", "GatedDeltaNet", "Mamba", "S4D", "RGLRU")
"""One mixer of each kind for `make test`; `make mixers` runs them all."""


def each(names):
    """One test a mixer; those that are not quick belong to the suite of the mixers."""
    marked = [pytest.param(name, marks=() if name in QUICK else pytest.mark.mixers) for name in names]
    return pytest.mark.parametrize("name", marked)


EVERY, EVERY_CAUSAL = each(CASES), each(CAUSAL)
A, B = slice(0, 5), slice(5, 12)
RANDOM = np.random.default_rng(3)
TOKENS = RANDOM.standard_normal((12, D_MODEL)).astype(np.float32)
NOISE = RANDOM.standard_normal((12, D_MODEL)).astype(np.float32)


def rows():
    """Documents A and B packed in one row; A before padding; padding before B. What padding holds is noise."""
    a, b = np.arange(5), np.arange(7)
    absent = [-np.ones(5, int), -np.ones(7, int)]
    positions = np.stack([np.r_[a, b], np.r_[a, absent[1]], np.r_[absent[0], b]])
    segments = np.stack([np.r_[0 * a, 0 * b + 1], np.zeros(12, int), np.zeros(12, int)])
    x = np.stack([TOKENS, np.r_[TOKENS[A], NOISE[B]], np.r_[NOISE[A], TOKENS[B]]])
    return x, positions.astype(np.int32), segments.astype(np.int32)


def close(one, other, tolerance=2e-5):
    """Equal to float32 rounding: sums of a few hundred terms."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert np.isfinite(one).all()
    np.testing.assert_allclose(one, other, atol=tolerance * max(np.abs(other).max(), 1e-3), rtol=0)


@EVERY
def test_neither_packing_nor_padding_changes_a_document(name):
    mixer = CASES[name]
    x, positions, segments = rows()
    y = forward(mixer, params_of(mixer), x, positions, segments)
    close(y[0, A], y[1, A])
    close(y[0, B], y[2, B])
    assert np.abs(y[0, 1:]).max() > 1e-3  # it computes something


@EVERY_CAUSAL
def test_the_past_does_not_see_the_future_nor_another_document(name):
    mixer = CASES[name]
    x, positions, segments = rows()

    def run(x):
        return np.asarray(forward(mixer, params_of(mixer), x, positions, segments))

    base = run(x)
    scale = 1e-5 * np.abs(base).max() if "fft" in getattr(mixer, "form", "") else 0.0
    for at, unseen in ((3, [*range(3), *range(5, 12)]), (8, range(8))):
        changed = x.copy()
        changed[0, at] += 1
        difference = np.abs(run(changed) - base)[0].max(-1)
        assert difference[list(unseen)].max() <= scale
        assert difference[at] > scale


@EVERY_CAUSAL
def test_decoding_in_parts_equals_the_whole(name):
    mixer = CASES[name]
    params = params_of(mixer)
    x = np.stack([TOKENS, np.r_[NOISE[:2], TOKENS[:10]]])
    positions = np.stack([np.arange(12), np.r_[-1, -1, np.arange(10)]]).astype(np.int32)
    whole = forward(mixer, params, x, positions, None)
    parts = in_parts(mixer, params, x, positions, cuts=(5, 7), room=16)
    close(parts[0], whole[0])
    close(parts[1, 2:], whole[1, 2:])


@each([name for name in CASES if len(forms(CASES[name])) > 1])
def test_forms_agree(name):
    x, positions, segments = rows()
    weights = (positions >= 0)[..., None] * np.cos(np.arange(D_MODEL, dtype=np.float32))

    def value(mixer):
        def loss(params, x):
            y = apply(mixer, params, x, positions, segments) * weights
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params_of(CASES[name]), x)

    (_, y), gradients = value(CASES[name])
    for other in forms(CASES[name])[1:]:
        (_, expected), expected_gradients = value(other)
        close(y, expected)
        scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_gradients))
        for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
            np.testing.assert_allclose(one, two, atol=5e-5 * scale, rtol=0)


@EVERY
def test_parameters_have_logical_axes_and_activations_are_sites(name):
    mixer = CASES[name]
    module, x = mixer.build(D_MODEL, 2, INIT, "mixer"), jnp.zeros((1, 8, D_MODEL))
    context, _ = enter(x[..., 0], None, None, None)

    def run(key):
        variables = module.init(key, x, context)
        return variables.get("params", {}), module.apply(variables, x, context, mutable=["sites"])[1]

    params, sites = jax.eval_shape(run, jax.random.key(0))
    known = {axis for axis, _ in RULES}
    for box in jax.tree.leaves(params, is_leaf=lambda leaf: hasattr(leaf, "names")):
        assert {n for n in box.names if n is not None} <= known, box.names
    assert jax.tree.leaves(sites)
