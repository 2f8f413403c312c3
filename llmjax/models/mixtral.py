"""Mixtral: Mistral with 8 experts in the place of its feed-forward layer, 2 a token. Jiang et al. 2024 (2401.04088)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import experts, llama
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import rope_of
from llmjax.models.settings import Their, expressible, optional, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope
from llmjax.nn.router import TopK

SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "8x7B": (32, 4096, 32, 14336, 32000),
    "8x22B": (56, 6144, 48, 16384, 32768),
}
"""layers, d_model, heads, width of an expert, vocabulary; 8 heads of keys and values"""
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
"""projections of an expert: our name, their name"""


def mixtral(size: Literal["8x7B", "8x22B"] = "8x7B") -> Decoder:
    """The config of a Mixtral model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Mixtral size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, d_ff, vocab = SIZES[size]
    block = Block(
        mixer=Attention(heads=heads, kv_heads=8, rope=Rope(base=1_000_000.0)),
        mlp=MoE(experts=8, expert=GLU(d_ff=d_ff), router=TopK(2), balance_loss=0.001),
        norm=RMSNorm(eps=1e-5),
    )
    return Decoder(
        vocab=vocab, d_model=d_model, layers=layers, pattern=(block,), norm=block.norm, initializer=LlamaInit()
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `mixtral` config.json; raises InputError for ill-typed values."""
    mixer = llama.attention_of(
        theirs,
        rope=rope_of(theirs, base=1_000_000.0),
        kv_heads=setting(theirs, "num_key_value_heads", 8),
        mask=llama.mask_of(optional(theirs, "sliding_window", 4096) if "sliding_window" in theirs else None),
    )
    mlp = MoE(
        experts=setting(theirs, "num_local_experts", 8),
        expert=llama.glu_of({"intermediate_size": 14336, **theirs}),
        router=TopK(setting(theirs, "num_experts_per_tok", 2)),
        balance_loss=setting(theirs, "router_aux_loss_coef", 0.001),
    )
    norm = RMSNorm(eps=setting(theirs, "rms_norm_eps", 1e-5))
    return llama.decoder_of(theirs, Block(mixer=mixer, mlp=mlp, norm=norm))


def to_hf_config(config: Decoder) -> Their:
    """The `mixtral` config.json of our config; raises InputError where Mixtral cannot say what it holds."""
    mixture, router = experts.mixture_of(config, "mixtral")
    theirs = llama.settings_of(experts.dense(config), FAMILY) | {
        "sliding_window": llama.window_of(config),
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": router.k,
        "router_aux_loss_coef": experts.balance_of(config),
    }
    return expressible(config, theirs, "mixtral", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """LLaMA's tensors but for the feed-forward layer, of which there is one tensor an expert and projection."""
    block = [*llama.attention_table(config), *llama.norm_table(llama.NORMS)]
    return experts.table(config, block, NAMES, "block_sparse_moe.")


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=llama.TIED,
)
