"""CLIP: an image tower and a text tower that meet in one space. Radford et al. 2021 (2103.00020)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.bert import dense
from llmjax.models.gpt_neox import layer_norm
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import Their, checked, expressible, mapping_of, setting
from llmjax.models.vit import block_of, patches, picture_of, sizes_of
from llmjax.nn.clip import CLIP
from llmjax.nn.decoder import Decoder
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.vit import ViT

SIZES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "ViT-B/32": (224, 32, 12, 768, 12, 512, 8),
    "ViT-B/16": (224, 16, 12, 768, 12, 512, 8),
    "ViT-L/14": (224, 14, 24, 1024, 16, 768, 12),
    "ViT-L/14@336": (336, 14, 24, 1024, 16, 768, 12),
}
"""pixels along an image and a patch; layers, d_model and heads of the image tower, d_model and heads of the text tower

The joint space is as wide as the text tower, which has 12 layers.
"""
PROJECTIONS = {
    "mixer/query": ("self_attn.q_proj", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/key": ("self_attn.k_proj", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/value": ("self_attn.v_proj", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/out": ("self_attn.out_proj", "d (h k) -> h k d", "d -> d"),
    "mlp/up": ("mlp.fc1", "o i -> i o", "o -> o"),
    "mlp/down": ("mlp.fc2", "o i -> i o", "o -> o"),
}
"""projections of a block: their name, the axes of their weight and of their bias"""
HIGHEST = 2
"""end token of old files, which meant the highest id of a text: the last of the vocabulary"""


def clip(size: Literal["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336"] = "ViT-B/32") -> CLIP:
    """The config of a CLIP model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown CLIP size {size!r}: use {', '.join(SIZES)}")
    side, patch, layers, d_model, heads, d_text, text_heads = SIZES[size]
    text = {"hidden_size": d_text, "num_attention_heads": text_heads, "intermediate_size": 4 * d_text}
    vision = {"image_size": side, "patch_size": patch, "num_hidden_layers": layers, "hidden_size": d_model}
    vision |= {"num_attention_heads": heads, "intermediate_size": 4 * d_model}
    return from_hf_config({"text_config": text, "vision_config": vision, "projection_dim": d_text})


def from_hf_config(theirs: Mapping[str, Any]) -> CLIP:
    """Our config of a `clip` config.json; raises InputError for ill-typed values."""
    text, vision = (mapping_of(theirs, f"{name}_config") for name in ("text", "vision"))
    text = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, **text}
    vision = {"patch_size": 32, **vision}
    vocab, end = setting(text, "vocab_size", 49408), setting(text, "eos_token_id", 49407)
    config = CLIP(
        vision=_vision(vision),
        text=_text(text, vocab),
        d_joint=setting(theirs, "projection_dim", 512),
        end_token=vocab - 1 if end == HIGHEST else end,
    )
    return checked(config)


def _vision(theirs: Mapping[str, Any]) -> ViT:
    block, norm = block_of(theirs, eps=1e-5, act="quick_gelu")
    side, patch = setting(theirs, "image_size", 224), setting(theirs, "patch_size", 32)
    return ViT(
        side=side,
        patch=patch,
        channels=setting(theirs, "num_channels", 3),
        classes=None,
        patch_bias=False,
        d_model=setting(theirs, "hidden_size", 768),
        layers=setting(theirs, "num_hidden_layers", 12),
        pattern=(block,),
        norm=norm,
        embedding_norm=norm,
        positions=LearnedPositions(1 + (side // max(patch, 1)) ** 2),
    )


def _text(theirs: Mapping[str, Any], vocab: int) -> Decoder:
    block, norm = block_of(theirs, eps=1e-5, act="quick_gelu", causal=True)
    return Decoder(
        vocab=vocab,
        d_model=setting(theirs, "hidden_size", 512),
        layers=setting(theirs, "num_hidden_layers", 12),
        pattern=(block,),
        norm=norm,
        positions=LearnedPositions(setting(theirs, "max_position_embeddings", 77)),
        tied=True,
    )


def to_hf_config(config: CLIP) -> Their:
    """The `clip` config.json of our config; raises InputError where CLIP cannot say what it holds."""
    if not isinstance(config, CLIP):
        raise InputError(f"{type(config).__name__} cannot be said in a clip config.json: it is a CLIP")
    text, vision = sizes_of(config.text, "clip", Decoder), sizes_of(config.vision, "clip", ViT)
    length = getattr(config.text.positions, "length", 77)
    ids = {"bos_token_id": None, "eos_token_id": config.end_token, "pad_token_id": None}
    text |= {"model_type": "clip_text_model", "vocab_size": config.vocab, "max_position_embeddings": length, **ids}
    theirs = {
        "model_type": FAMILY.model_type,
        "architectures": [FAMILY.architecture],
        "projection_dim": config.d_joint,
        "logit_scale_init_value": 2.6592,
        "text_config": text | {"projection_dim": config.d_joint},
        "vision_config": vision
        | picture_of(config.vision)
        | {"model_type": "clip_vision_model", "projection_dim": config.d_joint},
    }
    return expressible(replace(config, temperature=CLIP.temperature), theirs, "clip", from_hf_config)


def table(config: CLIP) -> tuple[Entry, ...]:
    """Both towers have blocks of the same names; theirs spell `pre_layrnorm` so."""
    block = [entry for ours, named in PROJECTIONS.items() for entry in dense(ours, *named)]
    block += layer_norm("mixer_norm", "layer_norm1") + layer_norm("mlp_norm", "layer_norm2")
    text = [
        Entry(("embed/embedding",), "embeddings.token_embedding.weight", "v d -> v d"),
        Entry(("positions/embedding",), "embeddings.position_embedding.weight", "l d -> l d"),
        *layer_norm("norm", "final_layer_norm"),
    ]
    vision = [
        Entry(("class_token",), "embeddings.class_embedding", "d -> d"),
        Entry(("positions/embedding",), "embeddings.position_embedding.weight", "l d -> l d"),
        patches("patch", "embeddings.patch_embedding", config.vision),
        *layer_norm("embedding_norm", "pre_layrnorm"),
        *layer_norm("norm", "post_layernorm"),
    ]
    blocks = [entry.at("blocks/*/", "encoder.layers.{i}.") for entry in block]
    return (
        *(entry.at("text/", "text_model.") for entry in text + blocks),
        *(entry.at("vision/", "vision_model.") for entry in vision + blocks),
        Entry(("text_projection/kernel",), "text_projection.weight", "o i -> i o"),
        Entry(("image_projection/kernel",), "visual_projection.weight", "o i -> i o"),
        Entry(("log_scale",), "logit_scale", "->"),
    )


FAMILY = Family(
    model_type="clip",
    architecture="CLIPModel",
    prefix="",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    ignored=r"embeddings\.position_ids$",
    extra=(),
)
