"""Latent attention: the equations as loops, the size of its cache, and which of its forms is taken.

`tests/parity/test_hf_attention_variants.py` compares it with transformers' DeepSeek-V2 and V3.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from llmjax.adapters import Adapted, LoRA
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mla import MLA
from llmjax.nn.model import flat, unflat
from llmjax.nn.projections import projections
from llmjax.nn.rope import Rope
from llmjax.nn.stored import Stored
from llmjax.quant.integers import Integer
from llmjax.quant.quantize import Quantize, quantise
from tests.flops import flops
from tests.mixers.cases import D_MODEL, INIT, enter, forward
from tests.mixers.drawn import drawn

SMALL = MLA(heads=3, kv_rank=6, q_rank=5, nope_dim=4, rope_dim=2, value_dim=3)
LENGTH = 7


def rms(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, positions):
    """One plane: by `position` radians."""
    cos, sin = np.cos(positions), np.sin(positions)
    return np.stack([x[:, 0] * cos - x[:, 1] * sin, x[:, 1] * cos + x[:, 0] * sin], axis=-1)


@pytest.mark.parametrize("q_rank", [5, None])
def test_equals_the_equations_as_loops(q_rank):
    """Heads one by one, tokens one by one, in float64; some tens of float32 terms a sum: 2e-6 of the largest value."""
    mixer = replace(SMALL, q_rank=q_rank, rope=Rope())
    params = drawn(mixer)
    x = np.random.default_rng(1).normal(size=(LENGTH, D_MODEL))
    at = np.arange(LENGTH)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    latent = rms(x @ p["latent_down"]["kernel"], p["norm"]["scale"])
    shared = turn(x @ p["rotary"]["kernel"], at)
    source, up = (x, p["query"]["kernel"]) if q_rank is None else (None, p["query_up"]["kernel"])
    if source is None:
        source = rms(x @ p["query_down"]["kernel"], p["query_norm"]["scale"])
    y = np.zeros((LENGTH, D_MODEL))
    for h in range(3):
        q = source @ up[:, h]
        q = np.concatenate([q[:, :4], turn(q[:, 4:], at)], axis=1)
        k = np.concatenate([latent @ p["key_up"]["kernel"][:, h], shared], axis=1)
        v = latent @ p["value_up"]["kernel"][:, h]
        for i in range(LENGTH):
            weights = np.exp(k[: i + 1] @ q[i] / np.sqrt(6))
            y[i] += weights @ v[: i + 1] / weights.sum() @ p["out"]["kernel"][h]
    ours = forward(mixer, params, x[None].astype(np.float32), at[None], None)[0]
    assert np.abs(ours - y).max() < 2e-6 * np.abs(y).max()


def test_the_cache_is_that_of_the_paper():
    """DeepSeek-V2, section 2.1.4: 9/2 head_dim elements a token and layer, what GQA keeps for 2.25 groups."""
    assert MLA().state_bytes(5120, 1000, jnp.bfloat16) == 1000 * 2 * 9 / 2 * 128


LARGE = MLA(heads=2)
"""DeepSeek-V2's sizes, of two heads: traced, never run."""


def traced(mixer, queries, room=None):
    """Operations, in the jaxpr, of a call on `queries` tokens: alone, or with a cache of `room`."""
    module = mixer.build(D_MODEL, 2, INIT)
    x, where = jnp.zeros((1, queries, D_MODEL)), jnp.zeros((1, queries), jnp.int32)
    shared = None if room is None else {"slot": jnp.zeros((), jnp.int32), "positions": jnp.zeros((1, room), jnp.int32)}
    state = None if room is None else jax.eval_shape(lambda: mixer.init_state(D_MODEL, 1, room, jnp.float32))

    def run(variables, x, state):
        return module.apply(variables, x, enter(x[..., 0], where, None, shared)[0], state)

    variables = meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), x, enter(where, None, None, None)[0])))
    return flops(run, variables, x, state), variables["params"]


@pytest.mark.parametrize("q_rank", [5, None])
def test_weights_are_counted_as_they_are(q_rank):
    mixer = replace(LARGE, q_rank=q_rank)
    matrices = [a for a in jax.tree.leaves(traced(mixer, 2)[1]) if len(a.shape) > 1]
    assert mixer.matmul_params(D_MODEL) == sum(a.size for a in matrices)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_operations_are_counted_as_they_are(form):
    """Of the whole call without the projections; norms and softmax add some percent."""
    mixer = replace(LARGE, causal=False, form=form)
    mixing = traced(mixer, 256)[0] / 256 - 2 * mixer.matmul_params(D_MODEL)
    assert 1 <= mixing / mixer.mixing_flops(D_MODEL, 256) < 1.1


@pytest.mark.parametrize(("queries", "cheaper"), [(1, "absorbed"), (64, "absorbed"), (400, "expanded")])
def test_auto_is_the_form_of_fewer_operations(queries, cheaper):
    counts = {form: traced(replace(LARGE, form=form), queries, 512)[0] for form in ("auto", "expanded", "absorbed")}
    assert counts["auto"] == counts[cheaper] == min(counts.values())


def test_matrices_that_are_handed_out_are_adapted_and_quantised():
    """Both forms read the up-projections with what is added to them, or as they are stored: 1e-5, sums reordered."""
    tokens = np.random.default_rng(0).integers(0, 11, (2, 5)).astype(np.int32)

    def decoder(form):
        block = Block(mixer=replace(SMALL, kv_rank=8, form=form), mlp=None)
        return Decoder(vocab=11, d_model=D_MODEL, layers=2, pattern=(block,))

    def logits(model, params):
        return np.asarray(jax.jit(lambda params: model.build().apply({"params": params}, tokens)[0])(params))

    bases = [decoder("expanded"), decoder("absorbed")]
    ups = [f"blocks/0/mixer/{name}_up" for name in ("key", "value")]
    assert all(projections(bases[0])[path].handed for path in ups)
    params = bases[0].init(jax.random.key(0))
    plain = logits(bases[0], params)

    models = [Adapted(base=base, adapters=(LoRA(rank=2, targets="_up$"),)) for base in bases]
    start = models[0].init(jax.random.key(1), params)
    np.testing.assert_array_equal(logits(models[0], start), plain)
    shaken = unflat({path: x + 0.3 if path.endswith("adapters/default/b") else x for path, x in flat(start).items()})
    one, other = (logits(model, shaken) for model in models)
    assert np.abs(one - other).max() < 1e-5 * np.abs(one).max() < 1e-2 * np.abs(one - plain).max()

    stored = quantise(bases[0], params, Quantize(format=Integer(bits=4, block=8), targets="(key|value)_up$"))
    assert all(isinstance(flat(stored)[f"{path}/kernel"], Stored) for path in ups)
    one, other = (logits(base, stored) for base in bases)
    assert np.abs(one - other).max() < 1e-5 * np.abs(one).max() < 1e-2 * np.abs(one - plain).max()
