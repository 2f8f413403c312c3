"""ViT: an encoder of patches with LayerNorm before each branch, and a classifier. Dosovitskiy et al. 2020."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.bert import dense
from llmjax.models.gpt_neox import layer_norm
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import (
    Their,
    activation_name,
    activation_of,
    architecture_of,
    checked,
    expressible,
    first,
    mapping_of,
    setting,
)
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mlp import MLP
from llmjax.nn.norms import LayerNorm
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.stack import Stack
from llmjax.nn.vit import ViT

SIZES: dict[str, tuple[int, int, int, int]] = {
    "B/16": (12, 768, 12, 16),
    "B/32": (12, 768, 12, 32),
    "L/16": (24, 1024, 16, 16),
    "L/32": (24, 1024, 16, 32),
    "H/14": (32, 1280, 16, 14),
}
"""layers, d_model, heads, pixels along a patch"""
PROJECTIONS = {
    "mixer/query": ("attention.attention.query", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/key": ("attention.attention.key", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/value": ("attention.attention.value", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/out": ("attention.output.dense", "d (h k) -> h k d", "d -> d"),
    "mlp/up": ("intermediate.dense", "o i -> i o", "o -> o"),
    "mlp/down": ("output.dense", "o i -> i o", "o -> o"),
}
"""projections of a block: their name, the axes of their weight and of their bias"""


def vit(
    size: Literal["B/16", "B/32", "L/16", "L/32", "H/14"] = "B/16", side: int = 224, classes: int | None = 1000
) -> ViT:
    """The config of a ViT; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown ViT size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, patch = SIZES[size]
    theirs: Their = {"num_hidden_layers": layers, "hidden_size": d_model, "num_attention_heads": heads}
    theirs |= {"intermediate_size": 4 * d_model, "image_size": side, "patch_size": patch, "layer_norm_eps": 1e-6}
    return from_hf_config(theirs | _labels(classes))


def from_hf_config(theirs: Mapping[str, Any]) -> ViT:
    """Our config of a `vit` config.json; raises InputError for ill-typed values.

    `architectures` tells whether there is a classifier; the pooler of a ViTModel, which none reads, is left out.
    """
    architecture = architecture_of(theirs, FAMILY.architecture, "ViTModel")
    labels = len(mapping_of(theirs, "id2label")) or setting(theirs, "num_labels", 2)
    block, norm = block_of(theirs, eps=1e-12)
    side, patch = setting(theirs, "image_size", 224), setting(theirs, "patch_size", 16)
    config = ViT(
        side=side,
        patch=patch,
        channels=setting(theirs, "num_channels", 3),
        classes=None if architecture == "ViTModel" else labels,
        d_model=setting(theirs, "hidden_size", 768),
        layers=setting(theirs, "num_hidden_layers", 12),
        pattern=(block,),
        norm=norm,
        positions=LearnedPositions(1 + (side // max(patch, 1)) ** 2),
        initializer=GPT2Init(std=setting(theirs, "initializer_range", 0.02)),
    )
    return checked(config)


def block_of(theirs: Mapping[str, Any], eps: float, act: str = "gelu", **own: Any) -> tuple[Block, LayerNorm]:
    """Our block of a config.json with ViT's keys, and its norm; `own` are further fields of attention."""
    norm = LayerNorm(eps=setting(theirs, "layer_norm_eps", eps))
    heads, bias = setting(theirs, "num_attention_heads", 12), setting(theirs, "qkv_bias", True)
    usual: dict[str, Any] = {"heads": heads, "causal": False, "rope": None, "bias": bias, "out_bias": True}
    d_ff, name = setting(theirs, "intermediate_size", 3072), activation_of(theirs, "hidden_act", act)
    mlp, dropout = MLP(d_ff=d_ff, activation=name, bias=True), setting(theirs, "hidden_dropout_prob", 0.0)
    return Block(Attention(**(usual | own)), mlp, norm, dropout=dropout), norm


def to_hf_config(config: ViT) -> Their:
    """The `vit` config.json of our config; raises InputError where ViT cannot say what it holds."""
    _, mixer, _ = first(config, "vit", Attention, MLP, ViT)
    theirs = {
        "model_type": FAMILY.model_type,
        "architectures": ["ViTModel" if config.classes is None else FAMILY.architecture],
        **sizes_of(config, "vit", ViT),
        **picture_of(config),
        "qkv_bias": mixer.bias,
        "hidden_dropout_prob": config.pattern[0].dropout,
        **_labels(config.classes),
    }
    return expressible(config, theirs, "vit", from_hf_config)


def sizes_of(config: Any, family: str, model: type[Stack]) -> Their:
    """What a config.json says of a stack of blocks with LayerNorm and an MLP."""
    block, mixer, mlp = first(config, family, Attention, MLP, model)
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": mixer.heads,
        "intermediate_size": mlp.d_ff,
        "hidden_act": activation_name(mlp.activation),
        "layer_norm_eps": getattr(block.norm, "eps", 1e-5),
    }


def picture_of(config: ViT) -> Their:
    """What a config.json says of images."""
    return {"image_size": config.side, "patch_size": config.patch, "num_channels": config.channels}


def _labels(classes: int | None) -> Their:
    if classes is None:
        return {"architectures": ["ViTModel"]}
    names = {str(i): f"LABEL_{i}" for i in range(classes)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def table(config: ViT) -> tuple[Entry, ...]:
    """The projection of patches is a convolution."""
    mixer: Any = config.pattern[0].mixer
    block = [entry for ours, named in PROJECTIONS.items() for entry in dense(ours, *named)]
    block = [entry for entry in block if mixer.bias or not unbiased(entry)]
    block += layer_norm("mixer_norm", "layernorm_before") + layer_norm("mlp_norm", "layernorm_after")
    return (
        Entry(("class_token",), "vit.embeddings.cls_token", "1 1 d -> d"),
        Entry(("positions/embedding",), "vit.embeddings.position_embeddings", "1 l d -> l d"),
        patches("patch", "vit.embeddings.patch_embeddings.projection", config),
        Entry(("patch/bias",), "vit.embeddings.patch_embeddings.projection.bias", "d -> d"),
        *(entry.at("blocks/*/", "vit.encoder.layer.{i}.") for entry in block),
        *layer_norm("norm", "vit.layernorm"),
        *(() if config.classes is None else dense("head", "classifier")),
    )


def unbiased(entry: Entry) -> bool:
    """Whether it is the bias of queries, keys or values."""
    return entry.paths[0] in ("mixer/query/bias", "mixer/key/bias", "mixer/value/bias")


def patches(ours: str, theirs: str, config: ViT) -> Entry:
    """The projection of patches, theirs a convolution with strides of a patch."""
    sizes = (("p", config.patch), ("q", config.patch))
    return Entry((f"{ours}/kernel",), f"{theirs}.weight", "d c p q -> (p q c) d", sizes)


FAMILY = Family(
    model_type="vit",
    architecture="ViTForImageClassification",
    prefix="vit.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    ignored=r"^(vit\.)?pooler\.",
    extra=(),
)
