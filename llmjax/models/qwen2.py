"""Qwen2 and Qwen2.5: LLaMA with biases of queries, keys and values. Yang et al. 2024 (2407.10671)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import llama
from llmjax.models.mapping import Family
from llmjax.models.rotary import rope_of
from llmjax.models.settings import Their, by_layer, expressible, kinds_of, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope

SIZES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "0.5B": (24, 896, 14, 2, 4864, 151936, True),
    "1.5B": (28, 1536, 12, 2, 8960, 151936, True),
    "7B": (28, 3584, 28, 4, 18944, 152064, False),
    "72B": (80, 8192, 64, 8, 29568, 152064, False),
}
"""layers, d_model, heads, kv_heads, d_ff, vocabulary, whether the head is tied"""


def qwen2(size: Literal["0.5B", "1.5B", "7B", "72B"] = "0.5B") -> Decoder:
    """The config of a Qwen2 or Qwen2.5 base model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Qwen2 size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, kv_heads, d_ff, vocab, tied = SIZES[size]
    block = Block(
        mixer=Attention(heads=heads, kv_heads=kv_heads, rope=Rope(base=1_000_000.0), bias=True),
        mlp=GLU(d_ff=d_ff),
        norm=RMSNorm(),
    )
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(block,),
        tied=tied,
        initializer=LlamaInit(),
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `qwen2` config.json; raises InputError for ill-typed values."""
    mixer = llama.attention_of(theirs, rope=rope_of(theirs), bias=True, out_bias=False)
    block = Block(mixer=mixer, mlp=llama.glu_of(theirs), norm=llama.rms_norm_of(theirs))
    return llama.decoder_of(theirs, *windowed(theirs, block))


def windowed(theirs: Mapping[str, Any], block: Block) -> tuple[Block, ...]:
    """The pattern of Qwen's layers: those from `max_window_layers` on see a window, where windows are used at all."""
    used = setting(theirs, "use_sliding_window", False)
    first = setting(theirs, "max_window_layers", 28)
    window = setting(theirs, "sliding_window", 4096) if used else None
    local = llama.attending(block, mask=llama.mask_of(window))
    layers = setting(theirs, "num_hidden_layers", 32)
    names = ("full_attention", "sliding_attention")
    return by_layer(theirs, layers, lambda i: names[i >= first and used], full_attention=block, sliding_attention=local)


def to_hf_config(config: Decoder) -> Their:
    """The `qwen2` config.json of our config; raises InputError where Qwen2 cannot say what it holds."""
    theirs = llama.settings_of(config, FAMILY) | windows(config)
    return expressible(config, theirs, "qwen2", from_hf_config)


def windows(config: Decoder) -> Their:
    """The keys that say which layers see a window."""
    window = llama.window_of(config)
    own = {"use_sliding_window": window is not None, "sliding_window": window}
    return own | {"layer_types": kinds_of(config, llama.kind_of)}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=llama.table,
    copies=llama.TIED,
)
