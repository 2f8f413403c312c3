"""Phi-3 and Phi-4-mini: LLaMA with fused projections, window and partial or long rotation. Abdin 2024 (2404.14219)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import llama
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import ORIGINAL, rope_of
from llmjax.models.settings import Their, expressible, first, optional, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope_scaling import LongRoPE

SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "mini": (32, 3072, 32, 32, 8192, 2047),
    "medium": (40, 5120, 40, 10, 17920, 2047),
}
"""layers, d_model, heads, kv_heads, d_ff, window (of the versions for 4,096 tokens)"""


def phi3(size: Literal["mini", "medium"] = "mini", vocab: int = 32064) -> Decoder:
    """The config of a Phi-3 model for 4,096 tokens; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Phi-3 size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, kv_heads, d_ff, window = SIZES[size]
    mixer = Attention(heads=heads, kv_heads=kv_heads, mask=llama.mask_of(window))
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(Block(mixer=mixer, mlp=GLU(d_ff=d_ff), norm=RMSNorm(eps=1e-5)),),
        norm=RMSNorm(eps=1e-5),
        initializer=LlamaInit(),
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `phi3` config.json; raises InputError for ill-typed values."""
    norm = llama.rms_norm_of({"rms_norm_eps": 1e-5} | dict(theirs))
    mask = llama.mask_of(optional(theirs, "sliding_window", 0) or None)
    mixer = llama.attention_of(theirs, rope=rope_of(theirs), mask=mask, bias=False, out_bias=False)
    d_ff = {"intermediate_size": setting(theirs, "intermediate_size", 8192)}
    return llama.decoder_of(theirs, Block(mixer=mixer, mlp=llama.glu_of(dict(theirs) | d_ff), norm=norm))


def to_hf_config(config: Decoder) -> Their:
    """The `phi3` config.json of our config; raises InputError where Phi-3 cannot say what it holds."""
    _, mixer, _ = first(config, "phi3", Attention, GLU)
    theirs = llama.settings_of(config, FAMILY) | {"sliding_window": llama.window_of(config), "pad_token_id": None}
    scaling = mixer.rope.scaling if mixer.rope is not None else None
    if isinstance(scaling, LongRoPE):
        theirs[ORIGINAL] = scaling.original_length
        theirs["max_position_embeddings"] = round(scaling.factor * scaling.original_length)
    return expressible(config, theirs, "phi3", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """LLaMA's tensors, with one for queries, keys and values and one for gate and up."""
    llama.require_layout(config, "half")
    projections = ("mixer/query/kernel", "mixer/key/kernel", "mixer/value/kernel")
    return llama.whole(
        config,
        [
            Entry(projections, "self_attn.qkv_proj.weight", "[h k] d -> d h k"),
            Entry(("mixer/out/kernel",), "self_attn.o_proj.weight", "d (h k) -> h k d"),
            Entry(("mlp/gate/kernel", "mlp/up/kernel"), "mlp.gate_up_proj.weight", "[o] i -> i o"),
            Entry(("mlp/down/kernel",), "mlp.down_proj.weight", "o i -> i o"),
            *llama.norm_table(llama.NORMS),
        ],
    )


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=llama.TIED,
    extra=("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"),
)
