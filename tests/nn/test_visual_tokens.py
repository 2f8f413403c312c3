"""Images in language models: replaced embeddings (A47) and gated cross-attention (A48)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from llmjax.config import ConfigError, InputError, validate
from llmjax.data.visual_dialogue import check_image_tokens, dialogue, expand
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.gated_cross_attention import Flamingo, GatedCrossAttentionModule
from llmjax.nn.mixer import Context, Memory
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.visual_tokens import LLaVA, Projector, splice
from llmjax.nn.vit import ViT
from llmjax.objectives.next_token import NextToken
from llmjax.objectives.with_images import WithImages
from llmjax.train.step import apply_of
from tests.evidence import evidence

pytestmark = pytest.mark.mixers

VISION = ViT(classes=None, side=8, patch=4, d_model=12, layers=1, positions=LearnedPositions(5))
LANGUAGE = Decoder(vocab=17, d_model=16, layers=2, pattern=(Block(mixer=Attention(heads=2)),), unroll=1)
INJECTED = LLaVA(vision=VISION, language=LANGUAGE, image_token=3)
GATED = Flamingo(vision=VISION, language=LANGUAGE)
TWO_STREAMS = (Block(mixer=Attention(heads=2), order="reversible"),)
RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.normal(size=(2, 8, 8, 3)), jnp.float32)
TOKENS = jnp.asarray([[5, 3, 3, 3, 3, 7, 9, 2, 6], [3, 3, 3, 3, 1, 8, 16, 4, 2]])
TEXT = jnp.where(TOKENS == 3, 11, TOKENS)


def params_of(model, zero=()):
    """Normals of the model's shapes; zero where a path ends in one of `zero`."""
    random = np.random.default_rng(1)

    def draw(path, a):
        scale = 0.0 if path[-1].key in zero else 0.3
        return jnp.asarray(random.normal(0, scale, a.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.abstract())


@evidence("A47", oracle="a loop over tokens", code="llmjax.nn.visual_tokens.splice")
def test_exactly_the_marked_tokens_are_replaced(evidence):
    x, visual = RANDOM.normal(size=(3, 7, 4)), RANDOM.normal(size=(3, 3, 4))
    at = np.array([[0, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0, 1], [0] * 7], bool)
    expected = x.copy()
    for row, column in np.argwhere(at):
        expected[row, column] = visual[row, at[row, :column].sum()]
    found = splice(jnp.asarray(x), jnp.asarray(visual), jnp.asarray(at))
    evidence.record(np.abs(found - expected.astype(np.float32)).max(), 0.0)


@evidence("A47", oracle="vision, projection and decoder by hand; the decoder alone", code="llmjax.nn.visual_tokens")
def test_image_features_stand_at_image_tokens(evidence):
    """At the image tokens the projected patches, elsewhere the table's rows; without images the decoder itself."""
    params, module = params_of(INJECTED), INJECTED.build()
    inputs = {"images": IMAGES}
    run = jax.jit(lambda p, t, **i: module.apply({"params": p}, t, **i, mutable=["sites"]))
    (logits, _), captured = run(params, TOKENS, **inputs)
    table = np.asarray(params["language"]["embed"]["embedding"])
    patches = VISION.build().apply({"params": params["vision"]}, IMAGES, method="features")[0].hidden[:, 1:]
    one, two = (params["projector"][name] for name in ("0", "1"))
    projected = jax.nn.gelu(patches @ one["kernel"] + one["bias"], approximate=False) @ two["kernel"] + two["bias"]
    expected = table[np.asarray(TOKENS)]
    expected[np.asarray(TOKENS) == 3] = np.asarray(projected).reshape(-1, 16)
    found = captured["sites"]["language"]["embedded"]
    evidence.record(np.abs(found - expected).max(), 1e-5)
    text = np.asarray(TOKENS) != 3
    evidence.record(np.abs(np.asarray(found)[text] - expected[text]).max(), 0.0)
    alone = jax.jit(lambda p, t: LANGUAGE.build().apply({"params": p}, t)[0])(params["language"], TOKENS)
    evidence.record(jnp.abs(run(params, TOKENS)[0][0] - alone).max(), 0.0)
    evidence.record(jnp.abs(run(params, TEXT, **inputs)[0][0] - run(params, TEXT)[0][0]).max(), 0.0)
    assert jnp.abs(logits - alone)[:, -1].max() > 1e-2


@pytest.mark.parametrize("model", [INJECTED, GATED], ids=["injected", "gated"])
def test_decoding_continues_what_images_began(model):
    """Prefill with the image, then single tokens (the injected image is in the cache): the whole pass's logits."""
    params, module = params_of(model), model.build()
    later = {} if model is INJECTED else {"images": IMAGES}
    step = jax.jit(lambda t, s, **i: module.apply({"params": params}, t, state=s, **i))
    out, state = step(TOKENS[:, :6], model.init_state(2, 9, jnp.float32), images=IMAGES)
    parts = [out]
    for i in range(6, 9):
        out, state = step(TOKENS[:, i : i + 1], state, **later)
        parts.append(out)
    whole = jax.jit(lambda t: module.apply({"params": params}, t, images=IMAGES)[0])(TOKENS)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=3e-5)


@evidence("A47", oracle="a loop over turns", code="llmjax.data.visual_dialogue")
def test_the_loss_counts_answers_only(evidence):
    """Two questions and answers after an image of 4 vectors, in rows with room to spare."""
    turns = [(expand([5, 3, 6], 3, 4), False), ([7, 8], True), ([9], False), ([10, 1], True)]
    batch = dialogue(turns, 14)
    tokens = [5, 3, 3, 3, 3, 6, 7, 8, 9, 10, 1]
    evidence.record(np.abs(batch["tokens"][0] - (tokens[:-1] + [0] * 4)).max(), 0)
    evidence.record(np.abs(batch["targets"][0] - (tokens[1:] + [0] * 4)).max(), 0)
    counted = [t for t, m in zip(batch["targets"][0], batch["loss_mask"][0], strict=True) if m]
    assert counted == [7, 8, 10, 1]
    with pytest.raises(InputError, match="12"):
        dialogue([([1] * 9, True), ([2] * 3, False)], 10)
    check_image_tokens(batch["tokens"], 3, 4)
    with pytest.raises(InputError, match="row 1"):
        check_image_tokens(np.array([[1, 2], [3, 2]]), 3, 4)


def test_the_loss_of_answers_reaches_vision():
    """NextToken with images: gradients at the projector and the encoder, none for what no answer depends on."""
    apply, params = apply_of(INJECTED.build()), params_of(INJECTED)
    ones = jnp.ones(TOKENS.shape)
    mask = jnp.asarray([[0] * 6 + [1, 1, 1], [0] * 9])
    batch = dict(tokens=TOKENS, targets=TOKENS, loss_mask=mask, target_bytes=ones, images=IMAGES)
    batch |= dict(positions=jnp.broadcast_to(jnp.arange(9), TOKENS.shape), segment_ids=jnp.ones_like(TOKENS))
    objective = WithImages(NextToken(chunk=None))

    def loss(params, images):
        return objective.loss(apply, params, batch | {"images": images}, None)[0]

    of_params, of_images = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, IMAGES)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params["projector"]))
    assert jnp.abs(of_params["vision"]["patch"]["kernel"]).max() > 0
    assert jnp.abs(of_images[0]).max() > 0
    assert jnp.abs(of_images[1]).max() == 0


GATES = ("attention_gate", "mlp_gate")


@evidence("A48", oracle="the language model alone", code="llmjax.nn.gated_cross_attention")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_zero_gates_leave_the_language_model_bitwise_unchanged(dtype, evidence):
    """With gates of 0 all logits are equal to the last bit; with open gates they are others.

    Compiled as written: by default XLA may skip a rounding to bfloat16 in one program and not in the other.
    """

    def logits(model, params, **images):
        run = jax.jit(lambda p: model.build().apply({"params": p}, TOKENS, **images)[0])
        return run.lower(params).compile(compiler_options={"xla_allow_excess_precision": False})

    params = jax.tree.map(lambda a: a.astype(dtype), params_of(GATED, zero=GATES))
    opened = jax.tree_util.tree_map_with_path(lambda p, a: a + (p[-1].key in GATES), params)
    gated, alone = logits(GATED, params, images=IMAGES), logits(LANGUAGE, params["language"])(params["language"])
    evidence.record(jnp.abs(gated(params) - alone).max(), 0.0)
    assert jnp.abs(gated(opened) - alone).max() > 1e-2
    np.testing.assert_array_equal(logits(GATED, opened)(opened), alone)


def test_untrained_gates_are_zero():
    layer = GatedCrossAttentionModule(GATED.gated, 16, 2, LANGUAGE.initializer)
    x, memory = jnp.zeros((1, 1, 16)), Memory(jnp.zeros((1, 4, 16)))
    context = Context(jnp.zeros((1, 1), jnp.int32), memory=memory)
    params = jax.jit(layer.init)(jax.random.key(0), x, context)["params"]
    assert len(pick(params, GATES)) == 2
    assert not any(gate.any() for gate in pick(params, GATES).values())


def pick(params, names):
    leaves = jax.tree_util.tree_leaves_with_path(meta.unbox(params))
    return {path[-1].key: leaf for path, leaf in leaves if path[-1].key in names}


@evidence("A48", oracle="attention over patches in NumPy", code="llmjax.nn.gated_cross_attention")
def test_an_open_gate_adds_attention_to_the_patches(evidence):
    """The first gated layer's two branches, recomputed from the stream and the projected patches."""
    params = params_of(GATED)
    run = jax.jit(lambda p: GATED.build().apply({"params": p}, TOKENS, images=IMAGES, mutable=["sites"])[1]["sites"])
    sites = run(params)
    memory, x = np.asarray(sites["projector"]["projected"]), np.asarray(sites["language"]["embedded"])
    layer = jax.tree.map(lambda a: np.asarray(a[0], np.float64), params["language"]["blocks"]["gated"])

    def norm(p, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    part = layer["attention"]
    q = np.einsum("bld,dhf->blhf", norm(layer["attention_norm"], x), part["query"]["kernel"])
    k, v = (np.einsum("bsd,dhf->bshf", memory, part[name]["kernel"]) for name in ("key", "value"))
    weights = np.exp(np.einsum("blhf,bshf->bhls", q, k) / np.sqrt(q.shape[-1]))
    z = np.einsum("bhls,bshf->blhf", weights / weights.sum(-1, keepdims=True), v)
    y = np.tanh(layer["attention_gate"]) * np.einsum("blhf,hfd->bld", z, part["out"]["kernel"])
    found = sites["language"]["blocks"]["gated"]
    evidence.record(np.abs(found["attention_out"][0] - y).max(), 1e-5)
    h = norm(layer["mlp_norm"], x + y) @ layer["mlp"]["up"]["kernel"]
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    y = np.tanh(layer["mlp_gate"]) * gelu @ layer["mlp"]["down"]["kernel"]
    evidence.record(np.abs(found["mlp_out"][0] - y).max(), 1e-5)


def test_gated_layers_are_rematerialised_with_their_blocks():
    """The same gradients, from fewer saved bytes."""

    def gradients(remat):
        model = dataclasses.replace(GATED, language=dataclasses.replace(LANGUAGE, remat=remat))
        logits = model.build().apply
        return (
            jax.jit(jax.grad(lambda p: (logits({"params": p}, TOKENS, images=IMAGES)[0] ** 2).mean()))
            .lower(params)
            .compile()
        )

    params = params_of(GATED)
    kept, again = gradients("none"), gradients("full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), kept(params), again(params))
    assert again.memory_analysis().temp_size_in_bytes < kept.memory_analysis().temp_size_in_bytes


def test_parameters_and_flops_are_counted():
    """Those of the parts; FLOPs of a row are the parts' FLOPs."""
    assert INJECTED.num_params() == VISION.num_params() + LANGUAGE.num_params() + 12 * 16 + 16 + 16 * 16 + 16
    gated = 2 * (4 * 16 * 16 + 2 * 16 * 64 + 4 * 16 + 2)
    assert GATED.num_params() == VISION.num_params() + LANGUAGE.num_params() + 12 * 16 + 16 + gated
    image = VISION.flops_per_image() + 6 * 4 * (12 * 16 + 16 * 16)
    assert INJECTED.flops_per_token(9) == pytest.approx(LANGUAGE.flops_per_token(9) + image / 9)
    layers = 2 * (6 * (4 * 16 * 16 + 2 * 16 * 64) + 3 * 4 * 16 * 4)
    image = VISION.flops_per_image() + 6 * 4 * 12 * 16
    assert GATED.flops_per_token(9) == pytest.approx(LANGUAGE.flops_per_token(9) + layers + image / 9)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (dataclasses.replace(INJECTED, image_token=17), "image_token"),
        (dataclasses.replace(INJECTED, vision=dataclasses.replace(VISION, classes=2)), "vision.classes"),
        (dataclasses.replace(INJECTED, projector=Projector(depth=0)), "depth"),
        (dataclasses.replace(GATED, language=dataclasses.replace(LANGUAGE, pattern=TWO_STREAMS)), "language.pattern"),
    ],
)
def test_what_does_not_fit_is_said(model, field):
    with pytest.raises(ConfigError, match=field):
        validate(model)
