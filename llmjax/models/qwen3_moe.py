"""Qwen3 with 128 experts, 8 a token, in the place of its feed-forward layer. Yang et al. 2025 (2505.09388)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import experts, llama
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import rope_of
from llmjax.models.settings import Their, expressible, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope
from llmjax.nn.router import TopK

SIZES: dict[str, tuple[int, int, int, int]] = {"30B-A3B": (48, 2048, 32, 768), "235B-A22B": (94, 4096, 64, 1536)}
"""layers, d_model, heads, width of an expert; 4 heads of keys and values, 128 features each"""


def qwen3_moe(size: Literal["30B-A3B", "235B-A22B"] = "30B-A3B", vocab: int = 151936) -> Decoder:
    """The config of a Qwen3 model with experts; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Qwen3-MoE size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, d_ff = SIZES[size]
    block = Block(
        mixer=Attention(heads=heads, kv_heads=4, head_dim=128, rope=Rope(base=1_000_000.0), qk_norm=RMSNorm()),
        mlp=MoE(experts=128, expert=GLU(d_ff=d_ff), router=TopK(8), balance_loss=0.001),
        norm=RMSNorm(),
    )
    return Decoder(vocab=vocab, d_model=d_model, layers=layers, pattern=(block,), initializer=LlamaInit())


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `qwen3_moe` config.json; raises InputError for ill-typed values."""
    norm = llama.rms_norm_of(theirs)
    window = setting(theirs, "sliding_window", 4096) if setting(theirs, "use_sliding_window", False) else None
    mixer = llama.attention_of(
        theirs,
        rope=rope_of(theirs),
        kv_heads=setting(theirs, "num_key_value_heads", 4),
        mask=llama.mask_of(window),
        qk_norm=norm,
    )
    plain = llama.glu_of(theirs)
    mixture = MoE(
        experts=setting(theirs, "num_local_experts", setting(theirs, "num_experts", 128)),
        expert=GLU(d_ff=setting(theirs, "moe_intermediate_size", 768), activation=plain.activation),
        router=TopK(setting(theirs, "num_experts_per_tok", 8), normalise=setting(theirs, "norm_topk_prob", False)),
        balance_loss=setting(theirs, "router_aux_loss_coef", 0.001),
    )
    step, left_out = setting(theirs, "decoder_sparse_step", 1), theirs.get("mlp_only_layers") or []
    if step < 1 or not isinstance(left_out, list):
        raise InputError(f"config.json: decoder_sparse_step={step} and mlp_only_layers={left_out!r} name no layers")
    pattern = experts.layered(
        setting(theirs, "num_hidden_layers", 32),
        Block(mixer=mixer, norm=norm),
        lambda i: plain if i in left_out or (i + 1) % step else mixture,
    )
    return llama.decoder_of(theirs, *pattern)


def to_hf_config(config: Decoder) -> Their:
    """The `qwen3_moe` config.json of our config; raises InputError where Qwen3-MoE cannot say what it holds."""
    mixture, router = experts.mixture_of(config, "qwen3_moe")
    dense, window = experts.dense(config), llama.window_of(config)
    theirs = llama.settings_of(dense, FAMILY) | {
        "attention_bias": getattr(config.pattern[0].mixer, "bias", False),
        "intermediate_size": experts.dense_width(config, 6144),
        "moe_intermediate_size": getattr(mixture.expert, "d_ff", None),
        "num_experts": mixture.experts,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.normalise,
        "router_aux_loss_coef": experts.balance_of(config),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(experts.sparse_layers(config)) if not sparse],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }
    return expressible(config, theirs, "qwen3_moe", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """Qwen3's tensors but for the feed-forward layer, of which there is one tensor an expert and projection."""
    return experts.table(config, [*llama.attention_table(config), *llama.norm_table(llama.NORMS)])


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=llama.TIED,
)
