"""Mistral: LLaMA with grouped queries and, in its first version, a sliding window. Jiang et al. 2023 (2310.06825)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import llama
from llmjax.models.mapping import Family
from llmjax.models.rotary import rope_of
from llmjax.models.settings import Their, expressible, optional, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope

SIZES: dict[str, tuple[int, float, int | None]] = {
    "7B": (32000, 10_000.0, 4096),
    "7B-v0.2": (32000, 1_000_000.0, None),
    "7B-v0.3": (32768, 1_000_000.0, None),
}
"""vocabulary, rotary base, window"""


def mistral(size: Literal["7B", "7B-v0.2", "7B-v0.3"] = "7B") -> Decoder:
    """The config of a Mistral model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Mistral size {size!r}: use {', '.join(SIZES)}")
    vocab, base, window = SIZES[size]
    block = Block(
        mixer=Attention(heads=32, kv_heads=8, rope=Rope(base=base), mask=llama.mask_of(window)),
        mlp=GLU(d_ff=14336),
        norm=RMSNorm(eps=1e-5),
    )
    return Decoder(
        vocab=vocab,
        d_model=4096,
        layers=32,
        pattern=(block,),
        norm=RMSNorm(eps=1e-5),
        initializer=LlamaInit(),
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `mistral` config.json; raises InputError for ill-typed values."""
    mixer = llama.attention_of(
        theirs,
        rope=rope_of(theirs),
        kv_heads=setting(theirs, "num_key_value_heads", 8),
        mask=llama.mask_of(optional(theirs, "sliding_window", 4096)),
    )
    return llama.decoder_of(theirs, Block(mixer=mixer, mlp=llama.glu_of(theirs), norm=llama.rms_norm_of(theirs)))


def to_hf_config(config: Decoder) -> Their:
    """The `mistral` config.json of our config; raises InputError where Mistral cannot say what it holds."""
    theirs = llama.settings_of(config, FAMILY) | {"sliding_window": llama.window_of(config)}
    return expressible(config, theirs, "mistral", from_hf_config)


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=llama.table,
    copies=llama.TIED,
)
