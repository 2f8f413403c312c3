"""The decoder as a whole: laws of causality, packing, caching, wiring and counting. Float32 rounding unless said."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import FanInInit
from llmjax.nn.masks import Full, Window
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.norms import LayerNorm, RMSNorm
from llmjax.nn.positions import LearnedPositions, SinusoidalPositions
from llmjax.nn.rope import Rope
from tests.evidence import evidence

ABSOLUTE = Attention(rope=None)
MODELS = {
    "llama": Decoder(pattern=(Block(mixer=Attention(heads=4, kv_heads=2)),)),
    "gpt2": Decoder(
        pattern=(Block(mixer=Attention(rope=None, bias=True, out_bias=True), mlp=MLP(bias=True), norm=LayerNorm()),),
        norm=LayerNorm(),
        positions=LearnedPositions(32),
        tied=True,
    ),
    "post": Decoder(pattern=(Block(mixer=ABSOLUTE, order="post"),), norm=None, positions=SinusoidalPositions()),
    "parallel": Decoder(pattern=(Block(mixer=Attention(kv_heads=1), order="parallel"),)),
    "window": Decoder(
        pattern=(Block(mixer=Attention(mask=Window(3))), Block(mixer=Attention(rope=Rope(layout="interleaved"))))
    ),
    "capped": Decoder(pattern=(Block(mixer=Attention(qk_norm=RMSNorm(), soft_cap=2.0), mlp=None),), soft_cap=3.0),
}
MODELS = {
    name: dataclasses.replace(m, vocab=29, d_model=16, layers=2 * len(m.pattern), unroll=1)
    for name, m in MODELS.items()
}
TOKENS = jax.random.randint(jax.random.key(7), (2, 11), 0, 29)
EVERY = pytest.mark.parametrize("name", list(MODELS))


def made(name):
    """A model, and parameters drawn without compiling anything: normals of 0.1, around 1 for scales."""
    random = np.random.default_rng(0)

    def draw(path, a):
        return np.float32((path[-1].key == "scale") + 0.1 * random.standard_normal(a.shape))

    return MODELS[name], jax.tree_util.tree_map_with_path(draw, MODELS[name].abstract())


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, *args):
    return model.build().apply({"params": params}, *args)[0]


@EVERY
def test_the_future_is_not_seen(name):
    model, params = made(name)
    changed = TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % 29)
    before, after = logits(model, params, TOKENS), logits(model, params, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert jnp.all(jnp.any(before[:, 6] != after[:, 6], axis=-1))


@evidence("J02", oracle="one full forward pass", code="llmjax.nn.decoder")
@EVERY
def test_cached_steps_equal_the_full_pass(name, evidence):
    model, params = made(name)
    full = logits(model, params, TOKENS)
    step = jax.jit(lambda p, t, s: model.build().apply({"params": p}, t, state=s))
    out, state = step(params, TOKENS[:, :5], model.init_state(2, 16, jnp.float32))
    parts = [out]
    for i in range(5, 11):
        out, state = step(params, TOKENS[:, i : i + 1], state)
        parts.append(out)
    evidence.record(jnp.max(jnp.abs(jnp.concatenate(parts, axis=1) - full)), 2e-5)


@EVERY
def test_left_padding_changes_nothing(name):
    model, params = made(name)
    padded = jnp.concatenate([jnp.zeros((2, 3), jnp.int32), TOKENS[:, :8]], axis=1)
    positions = jnp.concatenate([jnp.full((2, 3), -1), jnp.broadcast_to(jnp.arange(8), (2, 8))], axis=1)
    state = model.init_state(2, 16, jnp.float32)
    expected = logits(model, params, TOKENS)[:, :8]  # to which later tokens do not matter
    chex.assert_trees_all_close(logits(model, params, padded, positions, None, state)[:, 3:], expected, atol=2e-5)


@evidence("A06", oracle="each document alone", code="llmjax.nn.decoder")
@EVERY
def test_packed_documents_equal_separate_ones(name, evidence):
    model, params = made(name)
    segments = jnp.asarray([[1] * 4 + [2] * 7] * 2)
    positions = jnp.asarray([[*range(4), *range(7)]] * 2)
    packed = logits(model, params, TOKENS, positions, segments)
    alone = [logits(model, params, TOKENS[:, :7])[:, :4], logits(model, params, TOKENS[:, 4:])]
    evidence.record(jnp.max(jnp.abs(packed - jnp.concatenate(alone, axis=1))), 2e-5)


@evidence("A39", oracle="a separate pass for every prefix", code="llmjax.nn.decoder")
def test_one_pass_gives_the_logits_of_all_prefixes(evidence):
    model, params = made("gpt2")
    full = logits(model, params, TOKENS)
    prefixes = [logits(model, params, TOKENS[:, : n + 1])[:, -1] for n in (0, 3, 10)]
    evidence.record(jnp.max(jnp.abs(jnp.stack(prefixes, 1) - full[:, jnp.asarray([0, 3, 10])])), 2e-5)


def test_unrolling_and_remat_change_no_bit_of_the_layout_and_no_value():
    model, params = made("llama")

    def gradients(**changes):
        other = dataclasses.replace(model, **changes)
        chex.assert_trees_all_equal_shapes(other.abstract(), params)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(other.build().apply({"params": p}, TOKENS)[0]))))(params)

    base = gradients(unroll=1)
    for changes in ({"unroll": 2}, {"remat": "full"}, {"remat": "dots"}):
        chex.assert_trees_all_close(gradients(**changes), base, atol=2e-4, rtol=2e-4)


@pytest.mark.matrix
@evidence("E46", oracle="compiled memory_analysis", code="llmjax.nn.decoder")
def test_remat_saves_memory(evidence):
    def temporary(remat):
        model = Decoder(vocab=29, d_model=64, layers=8, unroll=8, remat=remat)
        tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

        def loss(p, t):
            return jnp.sum(model.build().apply({"params": p}, t)[0])

        return jax.jit(jax.grad(loss)).lower(model.abstract(), tokens).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = map(temporary, ("none", "dots", "full"))
    assert full < dots < none
    evidence.record(full / none, 0.5)


@evidence("A36", oracle="embedding times head", code="llmjax.nn.block")
@pytest.mark.parametrize("order", ["pre", "parallel"])
def test_zero_branches_leave_the_identity(order, evidence):
    model = Decoder(vocab=29, d_model=16, pattern=(Block(order=order),), norm=None, initializer=FanInInit())
    params = model.init(jax.random.key(0))
    expected = params["embed"]["embedding"][TOKENS] @ params["head"]["kernel"]
    evidence.record(jnp.max(jnp.abs(logits(model, params, TOKENS) - expected)), 1e-6)


@evidence("A02", oracle="sum over heads of z_h W_O,h", code="llmjax.nn.attention")
def test_output_is_the_sum_of_the_heads(evidence):
    model, params = made("llama")
    run = jax.jit(lambda p: model.build().apply({"params": p}, TOKENS, mutable=["sites"])[1]["sites"])
    sites = run(params)["blocks"]["0"]
    kernel = params["blocks"]["0"]["mixer"]["out"]["kernel"]
    by_head = sum(sites["mixer"]["z"][:, :, :, h] @ kernel[:, None, h] for h in range(4))
    evidence.record(jnp.max(jnp.abs(by_head - sites["mixer_out"])), 1e-5)


def test_window_reaches_exactly_its_tokens():
    """One layer, window 3: token i sees i-2..i; two windowed layers reach 2 further."""
    for layers, reach in ((1, 2), (2, 4)):
        model = Decoder(vocab=29, d_model=16, layers=layers, pattern=(Block(mixer=Attention(mask=Window(3))),))
        params = model.init(jax.random.key(0))
        base = logits(model, params, TOKENS)
        for distance in (reach, reach + 1):
            changed = TOKENS.at[:, 10 - distance].set((TOKENS[:, 10 - distance] + 1) % 29)
            differs = bool(jnp.any(logits(model, params, changed)[:, 10] != base[:, 10]))
            assert differs == (distance <= reach)


def test_soft_cap_bounds_the_logits():
    model, params = made("capped")
    params["head"]["kernel"] *= 1000
    out = logits(model, params, TOKENS)
    assert 2.9 < jnp.max(jnp.abs(out)) <= 3.0


def test_dropout_draws_by_key_and_is_off_in_evaluation():
    model = dataclasses.replace(MODELS["llama"], dropout=0.5, pattern=(Block(dropout=0.5),))
    params, module = model.init(jax.random.key(0)), model.build()

    @jax.jit
    def train(key):
        return module.apply({"params": params}, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(key)})[0]

    np.testing.assert_array_equal(train(1), train(1))
    assert jnp.any(train(1) != train(2))
    plain = dataclasses.replace(MODELS["llama"], pattern=(Block(),))
    chex.assert_trees_all_close(logits(model, params, TOKENS), logits(plain, params, TOKENS), atol=1e-6)


@evidence("E42", oracle="dtype audit of every site", code="llmjax.nn.decoder")
def test_compute_follows_the_parameters_dtype(evidence):
    model, params = made("gpt2")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    run = jax.jit(lambda p: model.build().apply({"params": p}, TOKENS, mutable=["sites"]))
    (out, _), variables = run(half)
    assert out.dtype == jnp.float32
    evidence.record(sum(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(variables["sites"])), 0)
    full = logits(model, params, TOKENS)
    assert jnp.max(jnp.abs(out - full)) < 0.05 * jnp.max(jnp.abs(full))  # 8 bits through 2 layers


@evidence("D18", oracle="closed formula of the layers' widths", code="llmjax.nn.model")
def test_num_params_is_the_closed_formula(evidence):
    model = Decoder(
        vocab=100, d_model=48, layers=6, pattern=(Block(mixer=Attention(heads=6, kv_heads=2), mlp=GLU(d_ff=40)),)
    )
    layer = 48 * 8 * (6 + 2 + 2) + 48 * 48 + 3 * 48 * 40 + 2 * 48
    evidence.record(abs(model.num_params() - (6 * layer + 2 * 100 * 48 + 48)), 0)


@evidence("E75", oracle="XLA cost_analysis of the forward pass", code="llmjax.nn.decoder")
def test_flops_are_those_that_xla_counts(evidence):
    """Full attention, so that the dense product that XLA runs is what the mask lets through; forward is a third."""
    model = Decoder(vocab=128, d_model=64, layers=2, pattern=(Block(mixer=Attention(causal=False, rope=None)),))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    run = jax.jit(lambda p, t: model.build().apply({"params": p}, t)[0])
    counted = run.lower(model.abstract(), tokens).compile().cost_analysis()["flops"]
    evidence.record(abs(counted / (model.flops_per_token(128) / 3 * 2 * 128) - 1), 0.05)


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_mixing_flops_count_the_pairs_of_the_mask(window, causal):
    mask = Full() if window is None else Window(window)
    config = Attention(heads=2, head_dim=4, mask=mask, causal=causal)
    i, j = np.indices((16, 16))
    seen = np.ones((16, 16), bool) if not causal else i >= j
    if window is not None:
        seen &= np.abs(i - j) < window
    assert config.mixing_flops(8, 16) == pytest.approx(4 * 2 * 4 * seen.sum() / 16)


def test_kv_bytes_are_those_of_the_state():
    model = MODELS["window"]
    state = model.init_state(1, 8, jnp.bfloat16)["blocks"]
    assert model.kv_bytes_per_token(jnp.bfloat16) * 8 == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Decoder(pattern=(Block(mixer=Attention(heads=8, kv_heads=3)),)),
            "pattern.0.mixer.kv_heads=3 does not divide heads=8: use 1, 2, 4 or 8",
        ),
        (Decoder(d_model=30), "pattern.0.mixer.heads=4 does not divide d_model=30: change it, or give head_dim"),
        (Decoder(layers=3, pattern=(Block(), Block())), "layers=3 must be a multiple of the pattern's length 2"),
        (Decoder(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
        (
            Decoder(pattern=(Block(mixer=Attention(mask=Window(0))),)),
            "pattern.0.mixer.mask.size=0 must be at least 1 token",
        ),
        (
            Decoder(pattern=(Block(mixer=Attention(implementation="flash")),)),
            "mixer.implementation=flash is no kernel of attention: use one of tpu, cudnn, xla, hopper, reference",
        ),
    ],
)
def test_configs_that_contradict_themselves_are_one_line(model, message):
    with pytest.raises(ConfigError) as caught:
        validate(model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
