"""RecurrentGemma: two of Griffin's recurrent blocks for one of local attention, GeGLU after each. De et al. 2024.

Botev et al. 2024 (2404.07839); Griffin: 2402.19427.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp

from llmjax.config import InputError
from llmjax.models import llama, mamba
from llmjax.models.mapping import Entry, Family, moved
from llmjax.models.rotary import rope_of, rope_settings
from llmjax.models.settings import Their, each, expressible, kinds_of, period, require, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.masks import Window
from llmjax.nn.mlp import GLU
from llmjax.nn.rg_lru import RGLRU

SIZES: dict[str, tuple[int, int, int, int]] = {"2B": (26, 2560, 10, 15360), "9B": (38, 4096, 16, 24576)}
"""layers, d_model, heads, twice d_ff"""
NORMS = {"mixer_norm": "temporal_pre_norm", "mlp_norm": "channel_pre_norm"}
"""norms of a block: our name, their name"""
GELU = "gelu_pytorch_tanh"


def recurrent_gemma(size: Literal["2B", "9B"] = "2B", vocab: int = 256_000) -> Decoder:
    """The config of a RecurrentGemma model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown RecurrentGemma size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, twice_d_ff = SIZES[size]
    sizes = {"num_hidden_layers": layers, "hidden_size": d_model, "num_attention_heads": heads, "vocab_size": vocab}
    return from_hf_config(sizes | {"intermediate_size": twice_d_ff, "num_key_value_heads": 1})


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `recurrent_gemma` config.json; raises InputError for ill-typed values."""
    theirs = {"num_hidden_layers": 26, "hidden_size": 2560, "num_attention_heads": 10, "vocab_size": 256_000, **theirs}
    heads, d_model = setting(theirs, "num_attention_heads", 10), setting(theirs, "hidden_size", 2560)
    require(theirs, hidden_activation=GELU, head_dim=d_model // max(heads, 1))
    types = theirs.get("block_types") or ["recurrent", "recurrent", "attention"]
    if not isinstance(types, list) or not all(name in ("recurrent", "attention") for name in types):
        raise InputError(f"config.json: block_types={types!r} is not supported: only recurrent and attention are")
    norm = llama.rms_norm_of(theirs, zero_centred=True)
    mlp = GLU(d_ff=setting(theirs, "intermediate_size", 7680) // 2, activation="gelu_tanh", bias=True)
    attention = llama.attention_of(
        theirs,
        mask=Window(setting(theirs, "attention_window_size", 2048)),
        rope=rope_of(theirs, fraction=0.5),
        out_bias=True,
    )
    recurrent = RGLRU(
        d_inner=setting(theirs, "lru_width", d_model),
        blocks=heads,
        taps=setting(theirs, "conv1d_width", 4),
    )
    blocks = {"attention": Block(attention, mlp, norm), "recurrent": Block(recurrent, mlp, norm)}
    kinds = [types[i % len(types)] for i in range(setting(theirs, "num_hidden_layers", 26))]
    return llama.decoder_of(
        theirs,
        *period([blocks[kind] for kind in kinds]),
        tied=True,
        soft_cap=setting(theirs, "logits_soft_cap", 30.0),
        embedding_scale=rounded_root(d_model),
    )


def rounded_root(d_model: int) -> float:
    """sqrt(d_model) in bfloat16, in which their model holds it whatever its weights are in."""
    return float(jnp.asarray(math.sqrt(d_model), jnp.bfloat16))


def to_hf_config(config: Decoder) -> Their:
    """The `recurrent_gemma` config.json of our config; raises InputError where it cannot say what that holds."""
    (block, attention, mlp), (_, recurrent, _) = each(config, "recurrent_gemma", GLU, Attention, RGLRU)
    theirs = {
        "model_type": FAMILY.model_type,
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "block_types": kinds_of(config, kind_of),
        "intermediate_size": 2 * mlp.d_ff,
        "hidden_activation": GELU,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "attention_bias": attention.bias,
        "attention_window_size": getattr(attention.mask, "size", 2048),
        "lru_width": recurrent.d_inner,
        "conv1d_width": recurrent.taps,
        "logits_soft_cap": config.soft_cap or 30.0,
        "rms_norm_eps": getattr(block.norm, "eps", 1e-6),
        "tie_word_embeddings": config.tied,
        **rope_settings(attention.rope),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return expressible(config, theirs, "recurrent_gemma", from_hf_config)


def kind_of(block: Block) -> str:
    """Which of the two kinds of layers it is."""
    return "attention" if isinstance(block.mixer, Attention) else "recurrent"


def table(config: Decoder) -> tuple[Entry, ...]:
    """LLaMA's names but for the blocks' parts."""
    full = next(block for block in config.pattern if kind_of(block) == "attention")
    only = replace(config, pattern=(full,))
    parts = {"attention": moved(llama.attention_table(only), "self_attn.", "temporal_block.")}
    parts["recurrent"] = [entry.at("mixer/", "temporal_block.") for entry in recurrent_table()]
    shared = [*llama.norm_table(NORMS), *moved(llama.glu_table(only), "mlp.", "mlp_block.")]
    found = moved(llama.outside(config), "model.norm.", "model.final_norm.")
    for at, block in enumerate(config.pattern):
        entries = [*parts[kind_of(block)], *shared]
        found += [entry.at(f"blocks/{at}/", "model.layers.{i}.") for entry in entries]
    return tuple(found)


def recurrent_table() -> list[Entry]:
    """Tensors of a recurrent block's mixer."""
    dense = {"up": "linear_x", "gate": "linear_y", "out": "linear_out"}
    gates = {"recurrence_gate": "recurrent_gate", "input_gate": "input_gate"}
    return [
        *(entry for ours, theirs in dense.items() for entry in mamba.projection((ours,), theirs, bias=True)),
        *mamba.convolution("conv_1d", bias=True),
        *(Entry((f"{ours}_kernel",), f"rg_lru.{theirs}_weight", "n i j -> n i j") for ours, theirs in gates.items()),
        *(Entry((f"{ours}_bias",), f"rg_lru.{theirs}_bias", "n i -> n i") for ours, theirs in gates.items()),
        Entry(("Lambda",), "rg_lru.recurrent_param", "i -> i"),
    ]


FAMILY = Family(
    model_type="recurrent_gemma",
    architecture="RecurrentGemmaForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=llama.TIED,
)
