"""gpt-oss: experts with biases and a bounded gate, sinks, windows in every other layer. OpenAI 2025 (2508.10925)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import experts, llama
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import rope_of
from llmjax.models.settings import Their, by_layer, expressible, kinds_of, mapping_of, require, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.masks import Window
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope
from llmjax.nn.rope_scaling import YaRN
from llmjax.nn.router import TopK

SIZES: dict[str, tuple[int, int]] = {"20B": (24, 32), "120B": (36, 128)}
"""layers, experts; 64 heads of 64 features, 8 of keys and values, 2880 features everywhere else"""
ROPE = Rope(base=150_000.0, scaling=YaRN(32.0, 4096, ramp="exact"))


def gpt_oss(size: Literal["20B", "120B"] = "20B", vocab: int = 201088) -> Decoder:
    """The config of a gpt-oss model (on 131,072 tokens); raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown gpt-oss size {size!r}: use {', '.join(SIZES)}")
    layers, count = SIZES[size]
    mixer = Attention(heads=64, kv_heads=8, head_dim=64, rope=ROPE, sinks=True, bias=True, out_bias=True)
    full = Block(mixer=mixer, mlp=_mixture(count, 4, 2880, 7.0, 0.001), norm=RMSNorm(eps=1e-5))
    return Decoder(
        vocab=vocab,
        d_model=2880,
        layers=layers,
        pattern=(llama.attending(full, mask=Window(128)), full),
        norm=full.norm,
        initializer=LlamaInit(),
    )


def _mixture(count: int, k: int, d_ff: int, limit: float, balance: float) -> MoE:
    expert = GLU(d_ff=d_ff, activation="gelu_quick", bias=True, limit=limit, shift=1.0)
    return MoE(experts=count, expert=expert, router=TopK(k), balance_loss=balance, logit_bias=True)


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `gpt_oss` config.json; raises InputError for ill-typed values, and for MXFP4 weights."""
    if mapping_of(theirs, "quantization_config"):
        raise InputError(
            "config.json: quantization_config: MXFP4 weights are not read: save the model in bfloat16 first"
        )
    require(theirs, hidden_act="silu", swiglu_alpha=1.702)
    bias = setting(theirs, "attention_bias", True)
    mixer = llama.attention_of(
        theirs,
        rope=rope_of(theirs, base=ROPE.base),
        kv_heads=setting(theirs, "num_key_value_heads", 8),
        head_dim=setting(theirs, "head_dim", 64),
        sinks=True,
        bias=bias,
        out_bias=bias,
    )
    if not any(key in theirs for key in ("rope_parameters", "rope_scaling")):
        mixer = replace(mixer, rope=ROPE)
    mixture = _mixture(
        setting(theirs, "num_local_experts", 128),
        setting(theirs, "num_experts_per_tok", 4),
        setting(theirs, "intermediate_size", 2880),
        setting(theirs, "swiglu_limit", 7.0),
        setting(theirs, "router_aux_loss_coef", 0.001),
    )
    full = Block(mixer=mixer, mlp=mixture, norm=RMSNorm(eps=setting(theirs, "rms_norm_eps", 1e-5)))
    local = llama.attending(full, mask=Window(setting(theirs, "sliding_window", 128)))
    layers, names = setting(theirs, "num_hidden_layers", 36), ("sliding_attention", "full_attention")
    pattern = by_layer(theirs, layers, lambda i: names[i % 2], full_attention=full, sliding_attention=local)
    return llama.decoder_of(theirs, *pattern)


def to_hf_config(config: Decoder) -> Their:
    """The `gpt_oss` config.json of our config; raises InputError where gpt-oss cannot say what it holds."""
    mixture, router = experts.mixture_of(config, "gpt_oss")
    theirs = llama.settings_of(experts.dense(config), FAMILY) | {
        "hidden_act": "silu",
        "attention_bias": getattr(config.pattern[0].mixer, "bias", True),
        "sliding_window": llama.window_of(config) or 128,
        "layer_types": kinds_of(config, llama.kind_of),
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": router.k,
        "swiglu_limit": getattr(mixture.expert, "limit", None),
        "swiglu_alpha": 1.702,
        "router_aux_loss_coef": experts.balance_of(config),
    }
    return expressible(config, theirs, "gpt_oss", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """Experts lie in one tensor, [inputs, outputs] each, the outputs of gate and up by turns."""
    one = (("one", 1),)
    gates = ("experts/gate", "experts/up")
    mlp = [
        Entry(("router/kernel",), "router.weight", "e d -> d e"),
        Entry(("router/logit_bias",), "router.bias", "e -> e"),
        Entry(tuple(f"{gate}/kernel" for gate in gates), "experts.gate_up_proj", "e d (f [one]) -> e d (f one)", one),
        Entry(tuple(f"{gate}/bias" for gate in gates), "experts.gate_up_proj_bias", "e (f [one]) -> e (f one)", one),
        Entry(("experts/down/kernel",), "experts.down_proj", "e f d -> e f d"),
        Entry(("experts/down/bias",), "experts.down_proj_bias", "e d -> e d"),
    ]
    attention = [*llama.attention_table(config), Entry(("mixer/sinks",), "self_attn.sinks", "h -> h")]
    return llama.whole(
        config, [*attention, *llama.norm_table(llama.NORMS), *(entry.at("mlp/", "mlp.") for entry in mlp)]
    )


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=llama.TIED,
)
