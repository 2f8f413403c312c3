"""BLOOM: ALiBi in place of positions, a norm of the embeddings, biases everywhere. BigScience 2022 (2211.05100)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.gpt_neox import biased, fused, layer_norm
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import Their, checked, expressible, first, require, setting
from llmjax.nn.alibi import ALiBi
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mlp import MLP
from llmjax.nn.norms import LayerNorm

Size = Literal["560M", "1.1B", "1.7B", "3B", "7.1B", "176B"]

SIZES: dict[str, tuple[int, int, int]] = {
    "560M": (24, 1024, 16),
    "1.1B": (24, 1536, 16),
    "1.7B": (24, 2048, 16),
    "3B": (30, 2560, 32),
    "7.1B": (30, 4096, 32),
    "176B": (70, 14336, 112),
}
"""layers, d_model, heads"""
DENSE = {
    "mixer/out": ("self_attention.dense", "d (h k) -> h k d"),
    "mlp/up": ("mlp.dense_h_to_4h", "o i -> i o"),
    "mlp/down": ("mlp.dense_4h_to_h", "o i -> i o"),
}
"""projections: their name and axes"""


def bloom(size: Size = "560M", vocab: int = 250_880) -> Decoder:
    """The config of a BLOOM model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown BLOOM size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads = SIZES[size]
    return from_hf_config({"vocab_size": vocab, "hidden_size": d_model, "n_layer": layers, "n_head": heads})


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `bloom` config.json; raises InputError for ill-typed values."""
    require(theirs, apply_residual_connection_post_layernorm=False)
    norm = LayerNorm(eps=setting(theirs, "layer_norm_epsilon", 1e-5))
    heads = setting(theirs, "n_head", setting(theirs, "num_attention_heads", 8))
    dropout = setting(theirs, "hidden_dropout", 0.0)
    block = Block(
        mixer=Attention(heads=heads, rope=None, bias=True, out_bias=True),
        mlp=MLP(activation="gelu_tanh", bias=True),
        norm=norm,
        dropout=dropout,
    )
    config = Decoder(
        vocab=setting(theirs, "vocab_size", 250_880),
        d_model=setting(theirs, "hidden_size", setting(theirs, "n_embed", 64)),
        layers=setting(theirs, "n_layer", setting(theirs, "num_hidden_layers", 2)),
        pattern=(block,),
        norm=norm,
        embedding_norm=norm,
        distance=ALiBi(),
        tied=setting(theirs, "tie_word_embeddings", True),
        initializer=GPT2Init(std=setting(theirs, "initializer_range", 0.02)),
    )
    return checked(config)


def to_hf_config(config: Decoder) -> Their:
    """The `bloom` config.json of our config; raises InputError where BLOOM cannot say what it holds."""
    block, mixer, _ = first(config, "bloom", Attention, MLP)
    theirs = {
        "model_type": "bloom",
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "n_layer": config.layers,
        "n_head": mixer.heads,
        "layer_norm_epsilon": getattr(block.norm, "eps", 1e-5),
        "tie_word_embeddings": config.tied,
        "hidden_dropout": config.pattern[0].dropout,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return expressible(config, theirs, "bloom", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """Queries, keys and values are one tensor, head by head."""
    block = [
        *fused(config, "self_attention.query_key_value"),
        *(Entry((f"{ours}/kernel",), f"{theirs}.weight", axes) for ours, (theirs, axes) in DENSE.items()),
        *(Entry((f"{ours}/bias",), f"{theirs}.bias", "o -> o") for ours, (theirs, _) in biased(config, DENSE).items()),
        *layer_norm("mixer_norm", "input_layernorm"),
        *layer_norm("mlp_norm", "post_attention_layernorm"),
    ]
    return (
        Entry(("embed/embedding",), "transformer.word_embeddings.weight", "v d -> v d"),
        *layer_norm("embedding_norm", "transformer.word_embeddings_layernorm"),
        *(entry.at("blocks/*/", "transformer.h.{i}.") for entry in block),
        *layer_norm("norm", "transformer.ln_f"),
        *(() if config.tied else (Entry(("head/kernel",), "lm_head.weight", "v d -> d v"),)),
    )


FAMILY = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    prefix="transformer.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    extra=("bos_token_id", "eos_token_id", "pad_token_id"),
)
