"""ViT, CLIP and their objectives: patches, permutations, counts, contrastive laws. Float32 rounding unless said."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.config import ConfigError, validate
from llmjax.data.shapes import Shapes
from llmjax.experiment import Experiment
from llmjax.nn.clip import CLIP, TEXT, VISION, at_most, unit, zero_shot_head
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.vit import ViT, patchify, unpatchify
from llmjax.objectives.classification import Classification
from llmjax.objectives.contrastive import Contrastive, contrastive_loss
from llmjax.parallel.mesh import RULES
from llmjax.train.config import Train
from llmjax.train.loop import fit
from llmjax.train.step import apply_of
from tests.evidence import evidence

pytestmark = pytest.mark.mixers

SIZES = dict(side=8, patch=4, d_model=16, layers=2, positions=LearnedPositions(5), unroll=1)
CLASSIFIER = ViT(classes=3, **SIZES)
PAIRED = CLIP(
    vision=dataclasses.replace(VISION, **SIZES),
    text=dataclasses.replace(TEXT, vocab=11, d_model=8, layers=2, positions=LearnedPositions(6), unroll=1),
    d_joint=6,
)
RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.normal(size=(4, 8, 8, 3)), jnp.float32)
TOKENS = jnp.asarray([[5, 3, 1, 0, 0], [7, 7, 2, 1, 0], [9, 1, 0, 0, 0], [4, 8, 6, 2, 1]])


def params_of(model):
    """Normals of the model's shapes: nothing is compiled."""
    leaves, tree = jax.tree.flatten(model.abstract())
    random = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [jnp.asarray(random.normal(0, 0.3, a.shape), jnp.float32) for a in leaves])


@evidence("A45", oracle="unpatchify inverts; a loop over patches", code="llmjax.nn.vit.patchify")
def test_patches(evidence):
    images = np.asarray(RANDOM.normal(size=(2, 8, 12, 3)), np.float32)
    patches = patchify(images, 4)
    expected = [images[:, r : r + 4, c : c + 4].reshape(2, -1) for r in (0, 4) for c in (0, 4, 8)]
    evidence.record(np.abs(np.asarray(patches) - np.stack(expected, axis=1)).max(), 0.0)
    evidence.record(np.abs(np.asarray(unpatchify(patches, 4, rows=2)) - images).max(), 0.0)


@evidence("A45", oracle="strided convolution of jax.lax", code="llmjax.nn.vit")
def test_patch_projection_is_a_strided_convolution(evidence):
    params = params_of(CLASSIFIER)
    run = jax.jit(lambda p: CLASSIFIER.build().apply({"params": p}, IMAGES, mutable=["sites"])[1])
    captured = run(params)
    kernel = params["patch"]["kernel"].reshape(4, 4, 3, 16)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(IMAGES, kernel, (4, 4), "VALID", dimension_numbers=layout)
    expected = expected.reshape(4, 4, 16) + params["patch"]["bias"]
    evidence.record(jnp.abs(captured["sites"]["patches"] - expected).max(), 2e-5)


@evidence("A45", oracle="permutation of the patches", code="llmjax.nn.vit")
def test_without_positions_the_order_of_patches_does_not_matter(evidence):
    """The class token's logits stay, the patches' states move along; with positions neither holds."""
    order = np.array([2, 0, 3, 1])
    moved = unpatchify(patchify(IMAGES, 4)[:, order], 4, rows=2)
    bare = dataclasses.replace(CLASSIFIER, positions=None)
    params = params_of(CLASSIFIER)
    run = jax.jit(lambda images: bare.build().apply({"params": params}, images, method="features")[0])
    one, two = run(IMAGES), run(moved)
    evidence.record(jnp.abs(one.logits - two.logits).max(), 5e-5)
    evidence.record(jnp.abs(one.hidden[:, 1:][:, order] - two.hidden[:, 1:]).max(), 5e-5)
    placed = jax.jit(lambda images: CLASSIFIER.build().apply({"params": params}, images)[0])
    assert jnp.abs(placed(IMAGES) - placed(moved)).max() > 1e-2


def test_parameters_are_counted_and_named():
    """A ViT by hand; ViT-B/16 has the 86.6 million of the paper's table 1, CLIP's names are known to the mesh."""
    d, block = 16, 4 * (16 * 16 + 16) + 2 * 16 * 64 + 64 + 16 + 4 * 16
    assert CLASSIFIER.num_params() == 48 * d + d + d + 5 * d + 2 * block + 2 * d + d * 3 + 3
    base = dataclasses.replace(
        ViT(side=224, patch=16, classes=1000, d_model=768, layers=12, positions=LearnedPositions(197)),
    )
    assert base.num_params() == 86_567_656
    known = {name for name, _ in RULES}
    for spec in jax.tree.leaves(PAIRED.logical_axes(), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)):
        assert {name for name in spec if name is not None} <= known


def test_flops_are_those_of_the_products():
    """3 times the forward pass's products, counted by hand with attention's 4 tokens^2 d."""
    tokens, d = 5, 16
    forward = tokens * (2 * 12 * d * d * 2 + 2 * 4 * d * tokens) + 2 * 4 * 48 * d + 2 * d * 3
    assert CLASSIFIER.flops_per_token(1) == pytest.approx(3 * forward)
    assert CLASSIFIER.flops_per_token(5) == pytest.approx(3 * forward / 5)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (dataclasses.replace(CLASSIFIER, patch=3), "patch"),
        (dataclasses.replace(CLASSIFIER, positions=LearnedPositions(4)), "positions.length"),
        (dataclasses.replace(CLASSIFIER, classes=0), "classes"),
        (dataclasses.replace(PAIRED, vision=CLASSIFIER), "vision.classes"),
        (dataclasses.replace(PAIRED, end_token=11), "end_token"),
        (dataclasses.replace(PAIRED, temperature=0.001), "temperature"),
        (dataclasses.replace(PAIRED, text=dataclasses.replace(PAIRED.text, tied=False)), "text.tied"),
    ],
)
def test_what_does_not_fit_is_said(model, field):
    with pytest.raises(ConfigError, match=field):
        validate(model)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="side=8"):
        CLASSIFIER.build().apply({"params": CLASSIFIER.abstract()}, IMAGES[:, :4])


@evidence("A45", oracle="optax cross-entropy of the logits", code="llmjax.objectives.classification")
def test_classification(evidence):
    params, labels = params_of(CLASSIFIER), jnp.asarray([0, 2, 1, 1])
    batch = {"images": IMAGES, "labels": labels[:, None], "tokens": TOKENS}
    apply = apply_of(CLASSIFIER.build())
    loss, metrics = jax.jit(lambda p: Classification().loss(apply, p, batch, None))(params)
    logits = jax.jit(lambda p: CLASSIFIER.build().apply({"params": p}, IMAGES)[0])(params)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    evidence.record(abs(float(loss - expected)), 1e-5)
    assert metrics["accuracy"].mean() == pytest.approx(np.mean(np.argmax(logits, axis=1) == labels))
    assert float(metrics["loss"].count) == TOKENS.size


def test_the_trainer_takes_images(tmp_path):
    """Two updates on pictures of shapes, and the held-out accuracy."""
    model = ViT(side=16, patch=8, classes=6, d_model=8, layers=1, positions=LearnedPositions(5))
    data = Shapes(side=16, batch_size=4, eval_rows=4)
    train = Train(steps=2, eval_every=2, checkpoint_every=0)
    result = fit(Experiment(model=model, data=data, objective=Classification(), train=train), tmp_path)
    assert result["steps"] == 2
    assert math.isfinite(result["val_loss"])
    assert result["val_accuracy"] in (0, 0.25, 0.5, 0.75, 1)


@evidence("A46", oracle="unit vectors; the text up to its end alone; matrix product", code="llmjax.nn.clip")
def test_clip_embeds_in_a_joint_space(evidence):
    """Norms are 1, padding after the end token changes nothing, logits are scaled cosines, the scale is capped."""
    params, module = params_of(PAIRED), PAIRED.build()
    run = jax.jit(lambda p, t: module.apply({"params": p}, t, IMAGES, method="features")[0])
    joint = run(params, TOKENS)
    for side in (joint.images, joint.texts):
        evidence.record(jnp.abs(jnp.linalg.norm(side, axis=-1) - 1).max(), 1e-6)
    padded = jnp.where(jnp.cumsum(TOKENS == 1, axis=1) - (TOKENS == 1) > 0, 9, TOKENS)
    assert (padded != TOKENS).any()
    evidence.record(jnp.abs(run(params, padded).texts - joint.texts).max(), 1e-6)
    logits = jax.jit(lambda p: module.apply({"params": p}, TOKENS, IMAGES)[0])(params)
    cosines = np.asarray(joint.images) @ np.asarray(joint.texts).T
    evidence.record(np.abs(logits - math.exp(params["log_scale"]) * cosines).max(), 1e-5)
    hot = run(params | {"log_scale": jnp.float32(7.0)}, TOKENS)
    evidence.record(abs(float(hot.scale) - 100), 1e-4)


def test_the_untrained_temperature_is_the_papers():
    log_scale = jax.jit(lambda: PAIRED.init(jax.random.key(0))["log_scale"])()
    assert float(log_scale) == pytest.approx(math.log(1 / 0.07))


def test_the_bounded_temperature_can_come_back():
    """Below the bound the gradient is whole; beyond it, only what leads back down is left."""
    slope = jax.grad(lambda x, sign: sign * at_most(x, 2.0))
    assert [float(slope(x, sign)) for x in (1.0, 3.0) for sign in (1.0, -1.0)] == [1.0, -1.0, 1.0, 0.0]


@evidence("A46", oracle="two cross-entropies of optax; log N; zero", code="llmjax.objectives.contrastive")
def test_contrastive_loss(evidence):
    logits = jnp.asarray(RANDOM.normal(0, 3, (6, 6)), jnp.float32)
    pairs = jnp.arange(6)
    rows, columns = (optax.softmax_cross_entropy_with_integer_labels(x, pairs).mean() for x in (logits, logits.T))
    evidence.record(abs(float(contrastive_loss(logits) - (rows + columns) / 2)), 1e-6)
    evidence.record(abs(float(contrastive_loss(logits) - contrastive_loss(logits.T))), 1e-6)
    same = unit(jnp.ones((6, 4)))
    evidence.record(abs(float(contrastive_loss(14 * same @ same.T)) - math.log(6)), 1e-5)
    evidence.record(abs(float(contrastive_loss(100 * jnp.eye(6)))), 1e-6)


def test_contrastive_objective():
    """The loss of the model's logits, and as many pairs found as the logits say."""
    params = params_of(PAIRED)
    apply = apply_of(PAIRED.build())
    batch = {"images": IMAGES, "tokens": TOKENS}
    loss, metrics = jax.jit(lambda p: Contrastive().loss(apply, p, batch, None))(params)
    logits = jax.jit(lambda p: PAIRED.build().apply({"params": p}, TOKENS, IMAGES)[0])(params)
    assert float(loss) == pytest.approx(float(contrastive_loss(logits)), abs=1e-5)
    for name, axis in (("image_accuracy", 1), ("text_accuracy", 0)):
        assert metrics[name].mean() == pytest.approx(np.mean(np.argmax(logits, axis=axis) == np.arange(4)))


@evidence("A46", oracle="nearest unit mean, a loop", code="llmjax.nn.clip.zero_shot_head")
def test_zero_shot_head(evidence):
    texts, image = RANDOM.normal(size=(3, 4, 5)), RANDOM.normal(size=5)
    found = unit(jnp.asarray(image)) @ zero_shot_head(jnp.asarray(texts))
    means = [np.mean([t / np.linalg.norm(t) for t in group], axis=0) for group in texts]
    cosines = [image @ m / np.linalg.norm(image) / np.linalg.norm(m) for m in means]
    evidence.record(np.abs(np.asarray(found) - cosines).max(), 1e-6)
