"""transformers' ViT and CLIP beside ours, on the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmjax.nn.clip import CLIP, TEXT, VISION
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.vit import ViT
from llmjax.objectives.contrastive import contrastive_loss
from tests.evidence import evidence
from tests.models.golden import relative_error

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5
"""Two layers of float32 on random weights: some hundred roundings of 6e-8."""
SIDE, PATCH, D, FF, HEADS, LAYERS = 12, 4, 24, 40, 4, 2
VIT_NAMES = {
    "mixer_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
CLIP_NAMES = {
    "mixer_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def randomised(module):
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "logit_scale":
                parameter.copy_(torch.from_numpy(rng.normal(0, 0.4, parameter.shape).astype(np.float32)))
    return module.eval(), {name: p.detach().numpy() for name, p in module.named_parameters()}


def norm(weights, name):
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def dense(weights, name, inputs=(-1,), outputs=(-1,)):
    """A torch Linear as kernel `[*inputs, *outputs]` and bias `[*outputs]`."""
    kernel = weights[f"{name}.weight"].T
    return {
        "kernel": kernel.reshape(*(inputs if inputs != (-1,) else kernel.shape[:1]), *outputs),
        "bias": weights[f"{name}.bias"].reshape(outputs),
    }


def blocks(weights, prefix, names):
    """All layers, stacked."""
    layers = []
    for i in range(LAYERS):
        at = {ours: f"{prefix}.{i}.{theirs}" for ours, theirs in names.items()}
        heads = (HEADS, D // HEADS)
        mixer = {name: dense(weights, at[name], outputs=heads) for name in ("query", "key", "value")}
        mixer["out"] = dense(weights, at["out"], inputs=heads)
        mlp = {name: dense(weights, at[name]) for name in ("up", "down")}
        norms = {name: norm(weights, at[name]) for name in ("mixer_norm", "mlp_norm")}
        layers.append({"mixer": mixer, "mlp": mlp, **norms})
    return {"0": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


def patch_kernel(weights, name):
    """A convolution `[d, channels, p, p]` as the projection of flattened patches."""
    kernel = weights[f"{name}.weight"]
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def resized(model, **changes):
    """The model at this test's sizes."""
    block = model.pattern[0]
    mixer = dataclasses.replace(block.mixer, heads=HEADS)
    mlp = dataclasses.replace(block.mlp, d_ff=FF)
    pattern = (dataclasses.replace(block, mixer=mixer, mlp=mlp),)
    return dataclasses.replace(model, d_model=D, layers=LAYERS, pattern=pattern, **changes)


def images():
    return np.random.default_rng(1).normal(size=(3, SIDE, SIDE, 3)).astype(np.float32)


@evidence("A45", oracle="transformers ViTForImageClassification", code="llmjax.nn.vit")
def test_vit(evidence):
    config = transformers.ViTConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FF,
        image_size=SIDE,
        patch_size=PATCH,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    module, weights = randomised(transformers.ViTForImageClassification(config))
    prefix = "vit.layers" if "vit.layers.0.mlp.fc1.weight" in weights else "vit.encoder.layer"
    embeddings = "vit.embeddings"
    params = {
        "patch": {
            "kernel": patch_kernel(weights, f"{embeddings}.patch_embeddings.projection"),
            "bias": weights[f"{embeddings}.patch_embeddings.projection.bias"],
        },
        "class_token": weights[f"{embeddings}.cls_token"].reshape(D),
        "positions": {"embedding": weights[f"{embeddings}.position_embeddings"][0]},
        "blocks": blocks(weights, prefix, VIT_NAMES),
        "norm": norm(weights, "vit.layernorm"),
        "head": dense(weights, "classifier"),
    }
    model = resized(ViT(side=SIDE, patch=PATCH, classes=5), positions=LearnedPositions(10))
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2)
    theirs = module(pixels)
    last = module.vit(pixels).last_hidden_state.detach().numpy()
    ours, _ = model.build().apply({"params": params}, images(), method="features")
    evidence.record(relative_error(ours.logits, theirs.logits.detach().numpy()), TOLERANCE)
    evidence.record(relative_error(ours.hidden, last), TOLERANCE)


@evidence("A46", oracle="transformers CLIPModel", code="llmjax.nn.clip")
def test_clip(evidence):
    """Embeddings, logits and loss; the text ends at token 3, as transformers looks for it where that is not 2."""
    shared = dict(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FF)
    text = dict(vocab_size=13, max_position_embeddings=8, eos_token_id=3, bos_token_id=0, pad_token_id=1, **shared)
    vision = dict(image_size=SIDE, patch_size=PATCH, **shared)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    module, weights = randomised(transformers.CLIPModel(config))
    params = {
        "vision": {
            "patch": {"kernel": patch_kernel(weights, "vision_model.embeddings.patch_embedding")},
            "class_token": weights["vision_model.embeddings.class_embedding"],
            "positions": {"embedding": weights["vision_model.embeddings.position_embedding.weight"]},
            "embedding_norm": norm(weights, "vision_model.pre_layrnorm"),
            "blocks": blocks(weights, "vision_model.encoder.layers", CLIP_NAMES),
            "norm": norm(weights, "vision_model.post_layernorm"),
        },
        "text": {
            "embed": {"embedding": weights["text_model.embeddings.token_embedding.weight"]},
            "positions": {"embedding": weights["text_model.embeddings.position_embedding.weight"]},
            "blocks": blocks(weights, "text_model.encoder.layers", CLIP_NAMES),
            "norm": norm(weights, "text_model.final_layer_norm"),
        },
        "image_projection": {"kernel": weights["visual_projection.weight"].T},
        "text_projection": {"kernel": weights["text_projection.weight"].T},
        "log_scale": weights["logit_scale"],
    }
    model = CLIP(
        vision=resized(VISION, side=SIDE, patch=PATCH, positions=LearnedPositions(10)),
        text=resized(TEXT, vocab=13, positions=LearnedPositions(8)),
        d_joint=10,
        end_token=3,
    )
    tokens = np.array([[0, 5, 6, 3, 1, 1], [0, 7, 12, 9, 8, 3], [0, 4, 3, 1, 1, 1]])
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2)
    theirs = module(input_ids=torch.from_numpy(tokens), pixel_values=pixels, return_loss=True)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.abstract())
    joint, _ = model.build().apply({"params": params}, tokens, images(), method="features")
    logits, _ = model.build().apply({"params": params}, tokens, images())
    evidence.record(relative_error(joint.images, theirs.image_embeds.detach().numpy()), TOLERANCE)
    evidence.record(relative_error(joint.texts, theirs.text_embeds.detach().numpy()), TOLERANCE)
    evidence.record(relative_error(logits, theirs.logits_per_image.detach().numpy()), TOLERANCE)
    evidence.record(abs(float(contrastive_loss(logits)) - theirs.loss.item()), 1e-5 * theirs.loss.item())
