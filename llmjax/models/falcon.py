"""Falcon: one or few heads of keys and values, both branches read the same stream. Almazrouei 2023 (2311.16867)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.gpt_neox import biased, layer_norm
from llmjax.models.llama import require_layout
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import rope_of, rope_settings
from llmjax.models.settings import Their, activation_name, activation_of, checked, expressible, first, require, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mlp import MLP
from llmjax.nn.norms import LayerNorm

SIZES: dict[str, tuple[int, int, int, int]] = {"7B": (32, 4544, 71, 1), "40B": (60, 8192, 128, 8)}
"""layers, d_model, heads, kv_heads"""
DENSE = {
    "mixer/out": ("self_attention.dense", "d (h k) -> h k d"),
    "mlp/up": ("mlp.dense_h_to_4h", "o i -> i o"),
    "mlp/down": ("mlp.dense_4h_to_h", "o i -> i o"),
}
"""projections: their name and axes"""


def falcon(size: Literal["7B", "40B"] = "7B", vocab: int = 65024) -> Decoder:
    """The config of a Falcon model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Falcon size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, kv_heads = SIZES[size]
    block = Block(
        mixer=Attention(heads=heads, kv_heads=kv_heads),
        mlp=MLP(activation="gelu"),
        norm=LayerNorm(),
        order="parallel" if kv_heads == 1 else "parallel_norms",
    )
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(block,),
        norm=LayerNorm(),
        tied=True,
        initializer=GPT2Init(),
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `falcon` config.json; raises InputError for ill-typed values, and for its scaled ALiBi."""
    require(theirs, alibi=False)
    norm = LayerNorm(eps=setting(theirs, "layer_norm_epsilon", 1e-5))
    heads, d_model = setting(theirs, "num_attention_heads", 71), setting(theirs, "hidden_size", 4544)
    new, bias = setting(theirs, "new_decoder_architecture", False), setting(theirs, "bias", False)
    few = setting(theirs, "num_kv_heads", heads) if new else 1 if setting(theirs, "multi_query", True) else heads
    norms = setting(theirs, "num_ln_in_parallel_attn", 2 if new else 1)
    side_by_side = new or setting(theirs, "parallel_attn", True)
    block = Block(
        mixer=Attention(heads=heads, kv_heads=few, rope=rope_of(theirs), bias=bias, out_bias=bias),
        mlp=MLP(
            d_ff=setting(theirs, "ffn_hidden_size", 4 * d_model),
            activation=activation_of(theirs, "activation", "gelu"),
            bias=bias,
        ),
        norm=norm,
        order="pre" if not side_by_side else "parallel_norms" if norms == 2 else "parallel",
        dropout=setting(theirs, "hidden_dropout", 0.0),
    )
    config = Decoder(
        vocab=setting(theirs, "vocab_size", 65024),
        d_model=d_model,
        layers=setting(theirs, "num_hidden_layers", 32),
        pattern=(block,),
        norm=norm,
        tied=setting(theirs, "tie_word_embeddings", True),
        initializer=GPT2Init(std=setting(theirs, "initializer_range", 0.02)),
    )
    return checked(config)


def to_hf_config(config: Decoder) -> Their:
    """The `falcon` config.json of our config; raises InputError where Falcon cannot say what it holds."""
    block, mixer, mlp = first(config, "falcon", Attention, MLP)
    new = block.order == "parallel_norms" or mixer.kv_heads not in (1, mixer.heads)
    theirs = {
        "model_type": "falcon",
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": mixer.heads,
        "num_kv_heads": mixer.kv_heads,
        "multi_query": mixer.kv_heads == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 2 if block.order == "parallel_norms" else 1,
        "parallel_attn": block.order != "pre",
        "bias": mixer.bias,
        "alibi": False,
        "ffn_hidden_size": mlp.d_ff,
        "activation": activation_name(mlp.activation),
        "layer_norm_epsilon": getattr(block.norm, "eps", 1e-5),
        "tie_word_embeddings": config.tied,
        "hidden_dropout": config.pattern[0].dropout,
        **rope_settings(mixer.rope),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return expressible(config, theirs, "falcon", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """Each group's queries, its key and its value stand one after another in one tensor."""
    require_layout(config, "half")
    block, mixer, _ = first(config, "falcon", Attention, MLP)
    kernels, biases = ([f"mixer/{part}/{kind}" for part in ("query", "key", "value")] for kind in ("kernel", "bias"))
    name, groups = "self_attention.query_key_value", (("g", mixer.kv_heads),)
    names = {"parallel": ["input_layernorm"], "parallel_norms": ["ln_attn", "ln_mlp"]}
    norms = zip(
        ("mixer_norm", "mlp_norm"),
        names.get(block.order, ["input_layernorm", "post_attention_layernorm"]),
        strict=False,
    )
    entries = [
        Entry(tuple(kernels), f"{name}.weight", "(g [q k]) d -> d (g q) k", groups),
        *([Entry(tuple(biases), f"{name}.bias", "(g [q k]) -> (g q) k", groups)] if mixer.bias else []),
        *(Entry((f"{ours}/kernel",), f"{theirs}.weight", axes) for ours, (theirs, axes) in DENSE.items()),
        *(Entry((f"{ours}/bias",), f"{theirs}.bias", "o -> o") for ours, (theirs, _) in biased(config, DENSE).items()),
        *(entry for ours, theirs in norms for entry in layer_norm(ours, theirs)),
    ]
    return (
        Entry(("embed/embedding",), "transformer.word_embeddings.weight", "v d -> v d"),
        *(entry.at("blocks/*/", "transformer.h.{i}.") for entry in entries),
        *layer_norm("norm", "transformer.ln_f"),
        *(() if config.tied else (Entry(("head/kernel",), "lm_head.weight", "v d -> d v"),)),
    )


FAMILY = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    prefix="transformer.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
)
