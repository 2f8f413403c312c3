"""Gemma 1, 2 and 3 (text): wide heads, factors 1 + scale, scaled embeddings, a tied head.

Gemma 2 has norms around its branches, soft caps and a window in every other layer; Gemma 3 five windows for a full
layer, two rotary bases, and norms of queries and keys. Gemma team 2024 (2403.08295, 2408.00118), 2025 (2503.19786).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import llama
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import parameters_of, rope_of, rotation
from llmjax.models.settings import (
    Their,
    activation_name,
    by_layer,
    expressible,
    first,
    kinds_of,
    mapping_of,
    optional,
    period,
    require,
    setting,
)
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.masks import Window
from llmjax.nn.mlp import GLU
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope

Shape = tuple[int, int, int, int, int, int]

GEMMA1: dict[str, Shape] = {"2B": (18, 2048, 8, 1, 256, 16384), "7B": (28, 3072, 16, 16, 256, 24576)}
"""layers, d_model, heads, kv_heads, head_dim, d_ff"""
GEMMA2: dict[str, Shape] = {
    "2B": (26, 2304, 8, 4, 256, 9216),
    "9B": (42, 3584, 16, 8, 256, 14336),
    "27B": (46, 4608, 32, 16, 128, 36864),
}
"""as GEMMA1; scores of the largest are divided by sqrt(d_model / heads), of the others by sqrt(head_dim)"""
GEMMA3: dict[str, Shape] = {"270M": (18, 640, 4, 1, 256, 2048), "1B": (26, 1152, 4, 1, 256, 6912)}
"""as GEMMA1; those that read no images"""
SANDWICH = {
    "mixer_norm": "input_layernorm",
    "mixer_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
"""norms of a block of Gemma 2 and 3: our name, their name"""
NORM = RMSNorm(zero_centred=True)


def gemma1(size: Literal["2B", "7B"] = "2B", vocab: int = 256_000) -> Decoder:
    """The config of a Gemma 1 model; raises InputError for an unknown size."""
    return _gemma("Gemma 1", GEMMA1, size, vocab)


def gemma2(size: Literal["2B", "9B", "27B"] = "2B", vocab: int = 256_000) -> Decoder:
    """The config of a Gemma 2 model; raises InputError for an unknown size."""
    config = _gemma("Gemma 2", GEMMA2, size, vocab)
    scale = 1 / math.sqrt(config.d_model / 32) if size == "27B" else None
    full = llama.attending(replace(config.pattern[0], order="sandwich"), soft_cap=50.0, scale=scale)
    return replace(config, pattern=(llama.attending(full, mask=Window(4096)), full), soft_cap=30.0)


def gemma3(size: Literal["270M", "1B"] = "270M", vocab: int = 262_144) -> Decoder:
    """The config of a Gemma 3 text model; raises InputError for an unknown size."""
    config = _gemma("Gemma 3", GEMMA3, size, vocab)
    block = replace(config.pattern[0], order="sandwich")
    full = llama.attending(block, qk_norm=NORM, rope=Rope(base=1_000_000.0))
    local = llama.attending(full, mask=Window(512), rope=Rope())
    layers = [full if i % 6 == 5 else local for i in range(config.layers)]
    return replace(config, pattern=period(layers))


def _gemma(name: str, sizes: dict[str, Shape], size: str, vocab: int) -> Decoder:
    if size not in sizes:
        raise InputError(f"unknown {name} size {size!r}: use {', '.join(sizes)}")
    layers, d_model, heads, kv_heads, head_dim, d_ff = sizes[size]
    block = Block(
        mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim),
        mlp=GLU(d_ff=d_ff, activation="gelu_tanh"),
        norm=NORM,
    )
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(block,),
        norm=NORM,
        tied=True,
        embedding_scale=math.sqrt(d_model),
        initializer=LlamaInit(),
    )


def read1(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `gemma` config.json, in which gelu has always meant its tanh form; raises InputError."""
    name = theirs.get("hidden_activation") or theirs.get("hidden_act")
    mlp = llama.glu_of({**theirs, "hidden_act": None if name == "gelu" else name}, usual="gelu_pytorch_tanh")
    mixer = _attention(theirs, rope=rope_of(theirs))
    return _decoder(theirs, Block(mixer=mixer, mlp=mlp, norm=llama.rms_norm_of(theirs, zero_centred=True)))


def read2(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `gemma2` config.json; raises InputError for ill-typed values."""
    block = _sandwich(theirs, cap=50.0, rope=rope_of(theirs))
    return _decoder(theirs, *_layers(theirs, block, block, every=2), soft_cap=_soft_cap(theirs, 30.0))


def read3(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `gemma3_text` config.json; raises InputError for ill-typed values."""
    given = mapping_of(theirs, "rope_parameters")
    base, local_base = setting(theirs, "rope_theta", 1_000_000.0), setting(theirs, "rope_local_base_freq", 10_000.0)
    far = {**mapping_of(theirs, "rope_scaling"), **mapping_of(given, "full_attention")}
    block = _sandwich(
        theirs, cap=None, rope=rotation(far, Rope(base=base)), qk_norm=llama.rms_norm_of(theirs, zero_centred=True)
    )
    near = rotation(mapping_of(given, "sliding_attention"), Rope(base=local_base))
    local = llama.attending(block, rope=near)
    every = setting(theirs, "sliding_window_pattern", 6)
    return _decoder(theirs, *_layers(theirs, block, local, every), soft_cap=_soft_cap(theirs, None))


def _attention(theirs: Mapping[str, Any], **own: Any) -> Attention:
    require(theirs, use_bidirectional_attention=False)
    return llama.attention_of(theirs, head_dim=setting(theirs, "head_dim", 256), **own)


def _sandwich(theirs: Mapping[str, Any], cap: float | None, **own: Any) -> Block:
    """A block of Gemma 2 and 3 that sees the whole past."""
    scalar = setting(theirs, "query_pre_attn_scalar", 256)
    cap = cap if "attn_logit_softcapping" not in theirs else optional(theirs, "attn_logit_softcapping", 0.0)
    return Block(
        mixer=_attention(theirs, scale=1 / math.sqrt(scalar), soft_cap=cap, **own),
        mlp=llama.glu_of(theirs, "hidden_activation", "gelu_pytorch_tanh"),
        norm=llama.rms_norm_of(theirs, zero_centred=True),
        order="sandwich",
    )


def _layers(theirs: Mapping[str, Any], full: Block, local: Block, every: int) -> tuple[Block, ...]:
    """The pattern: local layers, and a full one every so many."""
    near = llama.attending(local, mask=Window(setting(theirs, "sliding_window", 4096)))
    layers, names = setting(theirs, "num_hidden_layers", 26), ("full_attention", "sliding_attention")
    return by_layer(theirs, layers, lambda i: names[bool((i + 1) % every)], full_attention=full, sliding_attention=near)


def _soft_cap(theirs: Mapping[str, Any], usual: float | None) -> float | None:
    return usual if "final_logit_softcapping" not in theirs else optional(theirs, "final_logit_softcapping", 0.0)


def _decoder(theirs: Mapping[str, Any], *pattern: Block, **own: Any) -> Decoder:
    d_model = setting(theirs, "hidden_size", 2304)
    return llama.decoder_of(theirs, *pattern, tied=True, embedding_scale=math.sqrt(d_model), **own)


def write1(config: Decoder) -> Their:
    """The `gemma` config.json of our config; raises InputError where Gemma cannot say what it holds."""
    return expressible(config, _settings(config, FAMILY1), "gemma", read1)


def write2(config: Decoder) -> Their:
    """The `gemma2` config.json of our config; raises InputError where Gemma 2 cannot say what it holds."""
    return expressible(config, _settings(config, FAMILY2) | _local(config), "gemma2", read2)


def write3(config: Decoder) -> Their:
    """The `gemma3_text` config.json of our config; raises InputError where Gemma 3 cannot say what it holds."""
    theirs = _settings(config, FAMILY3) | _local(config)
    ropes = {llama.kind_of(block): getattr(block.mixer, "rope", None) or Rope() for block in config.pattern}
    theirs["rope_parameters"] = {kind: parameters_of(rope) for kind, rope in ropes.items()}
    theirs.pop("rope_scaling", None)
    theirs["rope_theta"] = ropes.get("full_attention", Rope(base=1_000_000.0)).base
    theirs["rope_local_base_freq"] = ropes.get("sliding_attention", Rope()).base
    return expressible(config, theirs, "gemma3_text", read3)


def _settings(config: Decoder, family: Family) -> Their:
    _, mixer, mlp = first(config, family.model_type, Attention, GLU)
    own = {"hidden_activation": activation_name(mlp.activation), "attention_bias": mixer.bias}
    return llama.settings_of(config, family) | own | {"pad_token_id": None}


def _local(config: Decoder) -> Their:
    """What Gemma 2 and 3 say of windows, scores and caps."""
    _, mixer, _ = first(config, "gemma", Attention, GLU)
    return {
        "query_pre_attn_scalar": round(mixer.scale**-2),
        "attn_logit_softcapping": mixer.soft_cap,
        "final_logit_softcapping": config.soft_cap,
        "sliding_window": llama.window_of(config) or 4096,
        "layer_types": kinds_of(config, llama.kind_of),
    }


def sandwich_table(config: Decoder) -> tuple[Entry, ...]:
    """LLaMA's tensors, with four norms."""
    return llama.table(config, SANDWICH)


FAMILY1 = Family("gemma", "GemmaForCausalLM", "model.", read1, write1, llama.table, copies=llama.TIED)
FAMILY2 = Family("gemma2", "Gemma2ForCausalLM", "model.", read2, write2, sandwich_table, copies=llama.TIED)
FAMILY3 = Family("gemma3_text", "Gemma3ForCausalLM", "model.", read3, write3, sandwich_table, copies=llama.TIED)
