"""GPT-2: learned positions, LayerNorm before each branch, tanh-GELU, biases, a tied head. Radford et al. 2019."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import (
    Their,
    activation_name,
    activation_of,
    checked,
    expressible,
    first,
    require,
    setting,
)
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mlp import MLP
from llmjax.nn.norms import LayerNorm
from llmjax.nn.positions import LearnedPositions

Size = Literal["18M", "30M", "124M", "355M", "774M", "1558M"]

SIZES: dict[str, tuple[int, int, int, int]] = {
    "18M": (6, 256, 8, 128),
    "30M": (6, 384, 6, 1024),
    "124M": (12, 768, 12, 1024),
    "355M": (24, 1024, 16, 1024),
    "774M": (36, 1280, 20, 1024),
    "1558M": (48, 1600, 25, 1024),
}
"""layers, d_model, heads, positions; 18M and 30M are demonstration sizes of ours, the rest are the published ones"""


def gpt2(size: Size = "124M", vocab: int = 50257, dropout: float = 0.0) -> Decoder:
    """The config of a GPT-2 model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown GPT-2 size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, length = SIZES[size]
    block = Block(
        mixer=Attention(heads=heads, rope=None, bias=True, out_bias=True),
        mlp=MLP(activation="gelu_tanh", bias=True),
        norm=LayerNorm(eps=1e-5),
        dropout=dropout,
    )
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(block,),
        norm=LayerNorm(eps=1e-5),
        positions=LearnedPositions(length),
        tied=True,
        dropout=dropout,
        initializer=GPT2Init(),
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `gpt2` config.json. Dropout of attention weights has no counterpart and is left out.

    Raises InputError for ill-typed values and for variants that GPT-2 itself does not use.
    """
    require(theirs, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    norm = LayerNorm(eps=setting(theirs, "layer_norm_epsilon", 1e-5))
    d_model = setting(theirs, "n_embd", 768)
    block = Block(
        mixer=Attention(heads=setting(theirs, "n_head", 12), rope=None, bias=True, out_bias=True),
        mlp=MLP(
            d_ff=setting(theirs, "n_inner", 4 * d_model),
            activation=activation_of(theirs, "activation_function", "gelu_new"),
            bias=True,
        ),
        norm=norm,
        dropout=setting(theirs, "resid_pdrop", 0.1),
    )
    config = Decoder(
        vocab=setting(theirs, "vocab_size", 50257),
        d_model=d_model,
        layers=setting(theirs, "n_layer", 12),
        pattern=(block,),
        norm=norm,
        positions=LearnedPositions(setting(theirs, "n_positions", 1024)),
        tied=setting(theirs, "tie_word_embeddings", True),
        dropout=setting(theirs, "embd_pdrop", 0.1),
        initializer=GPT2Init(std=setting(theirs, "initializer_range", 0.02)),
    )
    return checked(config)


def to_hf_config(config: Decoder) -> Their:
    """The `gpt2` config.json of our config; raises InputError where GPT-2 cannot say what it holds."""
    block, mixer, mlp = first(config, "gpt2", Attention, MLP)
    if not isinstance(config.positions, LearnedPositions):
        raise InputError(f"positions={config.positions} cannot be said in a gpt2 config.json: it has LearnedPositions")
    theirs = {
        "model_type": "gpt2",
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "n_positions": config.positions.length,
        "n_embd": config.d_model,
        "n_layer": config.layers,
        "n_head": mixer.heads,
        "n_inner": mlp.d_ff,
        "activation_function": activation_name(mlp.activation),
        "layer_norm_epsilon": getattr(block.norm, "eps", 1e-5),
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.pattern[0].dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return expressible(config, theirs, "gpt2", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """Conv1D kernels are [inputs, outputs] and queries, keys and values are one tensor."""
    kernels, biases = (
        tuple(f"mixer/{name}/{kind}" for name in ("query", "key", "value")) for kind in ("kernel", "bias")
    )
    block = (
        Entry(("mixer_norm/scale",), "ln_1.weight", "d -> d"),
        Entry(("mixer_norm/bias",), "ln_1.bias", "d -> d"),
        Entry(kernels, "attn.c_attn.weight", "d [h k] -> d h k"),
        Entry(biases, "attn.c_attn.bias", "[h k] -> h k"),
        Entry(("mixer/out/kernel",), "attn.c_proj.weight", "(h k) d -> h k d"),
        Entry(("mixer/out/bias",), "attn.c_proj.bias", "d -> d"),
        Entry(("mlp_norm/scale",), "ln_2.weight", "d -> d"),
        Entry(("mlp_norm/bias",), "ln_2.bias", "d -> d"),
        Entry(("mlp/up/kernel",), "mlp.c_fc.weight", "d f -> d f"),
        Entry(("mlp/up/bias",), "mlp.c_fc.bias", "f -> f"),
        Entry(("mlp/down/kernel",), "mlp.c_proj.weight", "f d -> f d"),
        Entry(("mlp/down/bias",), "mlp.c_proj.bias", "d -> d"),
    )
    return (
        Entry(("embed/embedding",), "transformer.wte.weight", "v d -> v d"),
        Entry(("positions/embedding",), "transformer.wpe.weight", "l d -> l d"),
        *(entry.at("blocks/*/", "transformer.h.{i}.") for entry in block),
        Entry(("norm/scale",), "transformer.ln_f.weight", "d -> d"),
        Entry(("norm/bias",), "transformer.ln_f.bias", "d -> d"),
        *(() if config.tied else (Entry(("head/kernel",), "lm_head.weight", "v d -> d v"),)),
    )


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    ignored=r"\bh\.\d+\.attn\.(masked_)?bias$",
    copies={"lm_head.weight": "transformer.wte.weight"},
    extra=("bos_token_id", "eos_token_id", "pad_token_id"),
)
