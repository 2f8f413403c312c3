"""OLMo 2: LLaMA with norms after its branches, and of all queries and keys. OLMo team 2025 (2501.00656)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import llama
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import rope_of
from llmjax.models.settings import Their, expressible, first
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope

SIZES: dict[str, tuple[int, int, int, int]] = {
    "1B": (16, 2048, 16, 8192),
    "7B": (32, 4096, 32, 11008),
    "13B": (40, 5120, 40, 13824),
}
"""layers, d_model, heads, d_ff"""
NORMS = {"mixer_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}


def olmo2(size: Literal["1B", "7B", "13B"] = "1B", vocab: int = 100352) -> Decoder:
    """The config of an OLMo 2 model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown OLMo 2 size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, d_ff = SIZES[size]
    mixer = Attention(heads=heads, rope=Rope(base=500_000.0), qk_norm=RMSNorm(), qk_norm_over="all")
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(Block(mixer=mixer, mlp=GLU(d_ff=d_ff), norm=RMSNorm(), order="branch"),),
        initializer=LlamaInit(),
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of an `olmo2` config.json; raises InputError for ill-typed values."""
    norm = llama.rms_norm_of({"rms_norm_eps": 1e-5} | dict(theirs))
    mixer = llama.attention_of(theirs, rope=rope_of(theirs), qk_norm=norm, qk_norm_over="all")
    return llama.decoder_of(theirs, Block(mixer=mixer, mlp=llama.glu_of(theirs), norm=norm, order="branch"))


def to_hf_config(config: Decoder) -> Their:
    """The `olmo2` config.json of our config; raises InputError where OLMo 2 cannot say what it holds."""
    _, mixer, _ = first(config, "olmo2", Attention, GLU)
    theirs = llama.settings_of(config, FAMILY) | {"attention_bias": mixer.bias}
    return expressible(config, theirs, "olmo2", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """LLaMA's tensors, with norms of other names."""
    return llama.table(config, NORMS)


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=llama.TIED,
)
