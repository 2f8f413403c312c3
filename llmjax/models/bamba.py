"""Bamba: Mamba-2 layers with a few of attention among them, each followed by SwiGLU. IBM et al. 2024.

Attention rotates half of a head. https://huggingface.co/blog/bamba
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import llama, mamba2
from llmjax.models.mapping import Entry, Family, moved
from llmjax.models.rotary import rope_of, rope_settings
from llmjax.models.settings import Their, activation_name, each, expressible, kinds_of, period, require, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.mlp import GLU

NORMS = {"mixer_norm": "input_layernorm", "mlp_norm": "pre_ff_layernorm"}
"""norms of a block: our name, their name"""


def bamba(size: Literal["9B"] = "9B", vocab: int = 128_256) -> Decoder:
    """The config of Bamba 9B; raises InputError for another size."""
    if size != "9B":
        raise InputError(f"unknown Bamba size {size!r}: use 9B")
    return from_hf_config({"vocab_size": vocab, "attn_layer_indices": [9, 18, 27], "mamba_d_state": 128})


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `bamba` config.json; raises InputError for ill-typed values."""
    layers = setting(theirs, "num_hidden_layers", 32)
    attending = theirs.get("attn_layer_indices") or []
    if not isinstance(attending, list) or not all(i in range(layers) for i in attending):
        raise InputError(f"config.json: attn_layer_indices={attending!r}: expected a list of layers")
    theirs = {"rms_norm_eps": 1e-5, "intermediate_size": 14336, "num_key_value_heads": 8, **theirs}
    norm, mlp = llama.rms_norm_of(theirs), llama.glu_of(theirs)
    attention = llama.attention_of(theirs, rope=rope_of(theirs, fraction=0.5))
    full, recurrent = (Block(mixer=mixer, mlp=mlp, norm=norm) for mixer in (attention, _mamba2(theirs)))
    pattern = period([full if i in attending else recurrent for i in range(layers)])
    return llama.decoder_of(theirs, *pattern)


def _mamba2(theirs: Mapping[str, Any]) -> Mamba2:
    d_inner = setting(theirs, "mamba_expand", 2) * setting(theirs, "hidden_size", 4096)
    heads = max(setting(theirs, "mamba_n_heads", 128), 1)
    automatic = theirs.get("mamba_d_head") == "auto"
    head_dim = d_inner // heads if automatic else setting(theirs, "mamba_d_head", d_inner // heads)
    require({"mamba_n_heads": heads}, mamba_n_heads=d_inner // max(head_dim, 1))
    mamba2.refuse_limit(theirs)
    return Mamba2(
        d_state=setting(theirs, "mamba_d_state", 256),
        expand=setting(theirs, "mamba_expand", 2),
        head_dim=head_dim,
        groups=setting(theirs, "mamba_n_groups", 1),
        taps=setting(theirs, "mamba_d_conv", 4),
        bias=setting(theirs, "mamba_proj_bias", False),
        conv_bias=setting(theirs, "mamba_conv_bias", True),
        eps=setting(theirs, "rms_norm_eps", 1e-5),
    )


def to_hf_config(config: Decoder) -> Their:
    """The `bamba` config.json of our config; raises InputError where Bamba cannot say what it holds."""
    (block, attention, mlp), (_, recurrent, _) = each(config, "bamba", GLU, Attention, Mamba2)
    kinds = kinds_of(config, kind_of)
    theirs = {
        "model_type": FAMILY.model_type,
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "attention_bias": attention.bias,
        "attn_layer_indices": [i for i, kind in enumerate(kinds) if kind == "attention"],
        "intermediate_size": mlp.d_ff,
        "hidden_act": activation_name(mlp.activation),
        "mlp_bias": mlp.bias,
        "mamba_n_heads": recurrent.expand * config.d_model // recurrent.head_dim,
        "mamba_d_head": recurrent.head_dim,
        "mamba_n_groups": recurrent.groups,
        "mamba_d_state": recurrent.d_state,
        "mamba_d_conv": recurrent.taps,
        "mamba_expand": recurrent.expand,
        "mamba_conv_bias": recurrent.conv_bias,
        "mamba_proj_bias": recurrent.bias,
        "rms_norm_eps": getattr(block.norm, "eps", 1e-5),
        "tie_word_embeddings": config.tied,
        **rope_settings(attention.rope),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return expressible(config, theirs, "bamba", from_hf_config)


def kind_of(block: Block) -> str:
    """Which of the two kinds of layers it is."""
    return "attention" if isinstance(block.mixer, Attention) else "mamba"


def table(config: Decoder) -> tuple[Entry, ...]:
    """LLaMA's tensors around Mamba-2's."""
    full, recurrent = (next(b for b in config.pattern if kind_of(b) == kind) for kind in ("attention", "mamba"))
    only = replace(config, pattern=(full,))
    parts = {"attention": llama.attention_table(only)}
    parts["mamba"] = [entry.at("mixer/", "mamba.") for entry in mamba2.mixer_table(recurrent.mixer)]
    shared = [*llama.norm_table(NORMS), *moved(llama.glu_table(only), "mlp.", "feed_forward.")]
    found = moved(llama.outside(config), "model.norm.", "model.final_layernorm.")
    for at, block in enumerate(config.pattern):
        entries = [*parts[kind_of(block)], *shared]
        found += [entry.at(f"blocks/{at}/", "model.layers.{i}.") for entry in entries]
    return tuple(found)


FAMILY = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=llama.TIED,
)
