"""DeepSeek-V2 and V3: latent attention, first layers dense, then small experts beside shared ones.

V2 weighs experts by softmax, V3 by sigmoid with biases that balance the load; both may take the experts of a few groups
alone. DeepSeek-AI 2024 (2405.04434, 2412.19437).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import experts, llama
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import rope_of, rope_settings
from llmjax.models.settings import (
    Their,
    activation_name,
    canonical,
    expressible,
    first,
    mapping_of,
    optional,
    require,
    setting,
)
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mla import MLA
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.rope_scaling import YaRN
from llmjax.nn.router import TopK

Shape = tuple[int, int, int, int | None, int, int, int, int, int, float]

V2: dict[str, Shape] = {
    "16B-Lite": (27, 2048, 16, None, 10944, 64, 6, 1408, 1, 1.0),
    "236B": (60, 5120, 128, 1536, 12288, 160, 6, 1536, 3, 16.0),
}
"""layers, d_model, heads, rank of queries, width of dense layers, experts, of them a token's, their width, groups that
a token takes them from (of 8, but for the smallest), factor of their weights; one dense layer, 2 shared experts"""
GREEDY, GROUPED = "greedy", "group_limited_greedy"
"""DeepSeek-V2's names of ways to choose experts"""


def deepseek_v2(size: Literal["16B-Lite", "236B"] = "16B-Lite", vocab: int = 102400) -> Decoder:
    """The config of a DeepSeek-V2 model (on 163,840 tokens); raises InputError for an unknown size."""
    if size not in V2:
        raise InputError(f"unknown DeepSeek-V2 size {size!r}: use {', '.join(V2)}")
    layers, d_model, heads, q_rank, d_ff, count, k, width, groups, factor = V2[size]
    router = TopK(k, normalise=False, scale=factor, groups=1 if groups == 1 else 8, top_groups=groups)
    mixture = MoE(experts=count, expert=GLU(d_ff=width), router=router, shared=2, balance_loss=0.001)
    mixer = _scaled(MLA(heads=heads, q_rank=q_rank), YaRN(40.0, 4096, magnitude=1.0), 0.707)
    pattern = experts.layered(layers, Block(mixer=mixer), lambda i: GLU(d_ff=d_ff) if i < 1 else mixture)
    return Decoder(vocab=vocab, d_model=d_model, layers=layers, pattern=pattern, initializer=LlamaInit())


def deepseek_v3(vocab: int = 129280) -> Decoder:
    """The config of DeepSeek-V3 (on 163,840 tokens) without its predictor of a second token."""
    router = TopK(8, "sigmoid", scale=2.5, groups=8, top_groups=4, group_best=2)
    mixture = MoE(256, GLU(d_ff=2048), router, shared=1, balance_loss=0.0001, bias_rate=0.001)
    mixer = _scaled(MLA(), YaRN(40.0, 4096, magnitude=1.0), 1.0)
    pattern = experts.layered(61, Block(mixer=mixer), lambda i: GLU(d_ff=18432) if i < 3 else mixture)
    return Decoder(vocab=vocab, d_model=7168, layers=61, pattern=pattern, initializer=LlamaInit(std=0.006))


def _scaled(mixer: MLA, yarn: YaRN, all_dim: float) -> MLA:
    """The mixer beyond its trained length, its scores scaled by (0.1 all_dim ln s + 1)^2 instead of its rotation."""
    magnitude = 0.1 * all_dim * math.log(yarn.factor) + 1
    scale = magnitude * magnitude / math.sqrt(mixer.nope_dim + mixer.rope_dim)
    return replace(mixer, rope=replace(mixer.rope, scaling=yarn), scale=scale if all_dim else None)


def read2(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `deepseek_v2` config.json; raises InputError for ill-typed values."""
    require(theirs, scoring_func="softmax", norm_topk_prob=False, mlp_bias=False)
    method = setting(theirs, "topk_method", GREEDY)
    if method not in (GREEDY, GROUPED):
        raise InputError(f"config.json: topk_method={method!r} is not supported: {GREEDY} and {GROUPED} are")
    router = TopK(
        setting(theirs, "num_experts_per_tok", 6),
        normalise=False,
        scale=setting(theirs, "routed_scaling_factor", 1.0),
        groups=setting(theirs, "n_group", 1) if method == GROUPED else 1,
        top_groups=setting(theirs, "topk_group", 1) if method == GROUPED else 1,
    )
    mixture = MoE(
        experts=setting(theirs, "n_routed_experts", 64),
        expert=GLU(d_ff=setting(theirs, "moe_intermediate_size", 1407)),
        router=router,
        shared=setting(theirs, "n_shared_experts", 2),
        balance_loss=setting(theirs, "aux_loss_alpha", 0.001),
    )
    return _read(
        theirs, MLA(rope=rope_of(theirs, layout="interleaved")), mixture, setting(theirs, "first_k_dense_replace", 0)
    )


def read3(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `deepseek_v3` config.json, whose predictor of a second token is left out; raises InputError."""
    require(theirs, scoring_func="sigmoid", topk_method="noaux_tc")
    router = TopK(
        setting(theirs, "num_experts_per_tok", 8),
        "sigmoid",
        setting(theirs, "norm_topk_prob", True),
        setting(theirs, "routed_scaling_factor", 2.5),
        groups=setting(theirs, "n_group", 8),
        top_groups=setting(theirs, "topk_group", 4),
        group_best=2,
    )
    mixture = MoE(
        experts=setting(theirs, "n_routed_experts", 256),
        expert=GLU(d_ff=setting(theirs, "moe_intermediate_size", 2048)),
        router=canonical(router),
        shared=setting(theirs, "n_shared_experts", 1),
        balance_loss=setting(theirs, "aux_loss_alpha", 0.0001),
        bias_rate=0.001,
    )
    layout = "interleaved" if setting(theirs, "rope_interleave", True) else "half"
    return _read(theirs, MLA(rope=rope_of(theirs, layout=layout)), mixture, setting(theirs, "first_k_dense_replace", 3))


def _read(theirs: Mapping[str, Any], start: MLA, mixture: MoE, dense_layers: int) -> Decoder:
    """The model of these mixtures, the first layers without."""
    require(theirs, attention_bias=False, moe_layer_freq=1, ep_size=1)
    if mapping_of(theirs, "quantization_config"):
        raise InputError("config.json: quantization_config: FP8 weights are not read: save the model in bfloat16 first")
    mixer = replace(
        start,
        heads=setting(theirs, "num_attention_heads", 128),
        kv_rank=setting(theirs, "kv_lora_rank", 512),
        q_rank=optional(theirs, "q_lora_rank", 1536),
        nope_dim=setting(theirs, "qk_nope_head_dim", 128),
        rope_dim=setting(theirs, "qk_rope_head_dim", 64),
        value_dim=setting(theirs, "v_head_dim", 128),
    )
    if isinstance(mixer.rope.scaling, YaRN):
        given = {**mapping_of(theirs, "rope_scaling"), **mapping_of(theirs, "rope_parameters")}
        mixer = _scaled(mixer, mixer.rope.scaling, setting(given, "mscale_all_dim", 0.0))
    plain = llama.glu_of(theirs)
    mixture = replace(mixture, expert=replace(mixture.expert, activation=plain.activation))
    layers = setting(theirs, "num_hidden_layers", 32)
    block = Block(mixer=mixer, norm=llama.rms_norm_of(theirs))
    pattern = experts.layered(layers, block, lambda i: plain if i < dense_layers else mixture)
    return llama.decoder_of(theirs, *pattern)


def write2(config: Decoder) -> Their:
    """The `deepseek_v2` config.json of our config; raises InputError where DeepSeek-V2 cannot say what it holds."""
    _, router = experts.mixture_of(config, "deepseek_v2")
    method = GREEDY if router.groups == 1 else GROUPED
    own = {"topk_method": method, "scoring_func": "softmax", "norm_topk_prob": False}
    return expressible(config, _settings(config, FAMILY2) | own, "deepseek_v2", read2)


def write3(config: Decoder) -> Their:
    """The `deepseek_v3` config.json of our config; raises InputError where DeepSeek-V3 cannot say what it holds."""
    _, mixer, _ = first(experts.dense(config), "deepseek_v3", MLA, GLU)
    own = {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_interleave": mixer.rope.layout == "interleaved",
        "num_nextn_predict_layers": 0,
    }
    return expressible(config, _settings(config, FAMILY3) | own, "deepseek_v3", read3)


def _settings(config: Decoder, family: Family) -> Their:
    """The keys that both have."""
    mixture, router = experts.mixture_of(config, family.model_type)
    block, mixer, mlp = first(experts.dense(config), family.model_type, MLA, GLU)
    sparse = experts.sparse_layers(config)
    return {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.heads,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "intermediate_size": experts.dense_width(config, 4 * config.d_model),
        "moe_intermediate_size": getattr(mixture.expert, "d_ff", None),
        "first_k_dense_replace": sparse.index(True),
        "n_routed_experts": mixture.experts,
        "n_shared_experts": mixture.shared,
        "num_experts_per_tok": router.k,
        "n_group": router.groups,
        "topk_group": router.top_groups,
        "norm_topk_prob": router.normalise,
        "routed_scaling_factor": router.scale,
        "aux_loss_alpha": experts.balance_of(config),
        "hidden_act": activation_name(mlp.activation),
        "rms_norm_eps": getattr(block.norm, "eps", 1e-6),
        "attention_bias": False,
        "tie_word_embeddings": config.tied,
        **_rope_settings(mixer),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _rope_settings(mixer: MLA) -> Their:
    """The rotation, and as part of it the factor of the scores."""
    theirs = rope_settings(mixer.rope)
    yarn = mixer.rope.scaling
    if not isinstance(yarn, YaRN) or mixer.scale is None or yarn.factor == 1:
        return theirs
    log, root = 0.1 * math.log(yarn.factor), math.sqrt(mixer.scale * math.sqrt(mixer.nope_dim + mixer.rope_dim))
    own = {"mscale_all_dim": round((root - 1) / log, 9)}
    if yarn.magnitude is not None:
        own["mscale"] = round((yarn.magnitude * root - 1) / log, 9)
    return {key: value | own if isinstance(value, dict) else value for key, value in theirs.items()}


def table(config: Decoder) -> tuple[Entry, ...]:
    """Their kv_a makes the latent and the rotary part of the key, their kv_b keys and values of each head."""
    mixer: Any = config.pattern[0].mixer
    query = [
        Entry(("query_down/kernel",), "q_a_proj.weight", "r d -> d r"),
        Entry(("query_norm/scale",), "q_a_layernorm.weight", "r -> r"),
        Entry(("query_up/kernel",), "q_b_proj.weight", "(h k) r -> r h k"),
    ]
    if mixer.q_rank is None:
        query = [Entry(("query/kernel",), "q_proj.weight", "(h k) d -> d h k")]
    latent = [
        Entry(("latent_down/kernel", "rotary/kernel"), "kv_a_proj_with_mqa.weight", "[r] d -> d r"),
        Entry(("norm/scale",), "kv_a_layernorm.weight", "r -> r"),
        Entry(("key_up/kernel", "value_up/kernel"), "kv_b_proj.weight", "(h [k]) r -> r h k"),
        Entry(("out/kernel",), "o_proj.weight", "d (h k) -> h k d"),
    ]
    attention = [entry.at("mixer/", "self_attn.") for entry in query + latent]
    return experts.table(config, [*attention, *llama.norm_table(llama.NORMS)])


FAMILY2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", "model.", read2, write2, table, copies=llama.TIED)
FAMILY3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    prefix="model.",
    from_hf_config=read3,
    to_hf_config=write3,
    table=table,
    ignored=r"rotary_emb\.inv_freq$|^model\.layers\.61\.",  # the predictor of a second token of the published model
    copies=llama.TIED,
)
