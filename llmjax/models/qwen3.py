"""Qwen3, dense: LLaMA with norms of queries and keys and heads of their own width. Yang et al. 2025 (2505.09388)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import llama
from llmjax.models.mapping import Family
from llmjax.models.qwen2 import windowed, windows
from llmjax.models.rotary import rope_of
from llmjax.models.settings import Their, expressible, first, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope

Size = Literal["0.6B", "1.7B", "4B", "8B", "14B", "32B"]

SIZES: dict[str, tuple[int, int, int, int, bool]] = {
    "0.6B": (28, 1024, 16, 3072, True),
    "1.7B": (28, 2048, 16, 6144, True),
    "4B": (36, 2560, 32, 9728, True),
    "8B": (36, 4096, 32, 12288, False),
    "14B": (40, 5120, 40, 17408, False),
    "32B": (64, 5120, 64, 25600, False),
}
"""layers, d_model, heads, d_ff, whether the head is tied; 8 heads of keys and values, 128 features each"""


def qwen3(size: Size = "0.6B", vocab: int = 151936) -> Decoder:
    """The config of a dense Qwen3 model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Qwen3 size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, d_ff, tied = SIZES[size]
    mixer = Attention(heads=heads, kv_heads=8, head_dim=128, rope=Rope(base=1_000_000.0), qk_norm=RMSNorm())
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(Block(mixer=mixer, mlp=GLU(d_ff=d_ff), norm=RMSNorm()),),
        tied=tied,
        initializer=LlamaInit(),
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `qwen3` config.json; raises InputError for ill-typed values."""
    norm = llama.rms_norm_of(theirs)
    mixer = llama.attention_of(theirs, rope=rope_of(theirs), head_dim=setting(theirs, "head_dim", 128), qk_norm=norm)
    return llama.decoder_of(theirs, *windowed(theirs, Block(mixer=mixer, mlp=llama.glu_of(theirs), norm=norm)))


def to_hf_config(config: Decoder) -> Their:
    """The `qwen3` config.json of our config; raises InputError where Qwen3 cannot say what it holds."""
    _, mixer, _ = first(config, "qwen3", Attention, GLU)
    theirs = llama.settings_of(config, FAMILY) | windows(config) | {"attention_bias": mixer.bias}
    return expressible(config, theirs, "qwen3", from_hf_config)


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=llama.table,
    copies=llama.TIED,
)
