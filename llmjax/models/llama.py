"""LLaMA 1 to 3: rotary positions, RMSNorm before each branch, SwiGLU, no biases. Touvron et al. 2023 (2302.13971)."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from llmjax.config import InputError
from llmjax.models import mapping
from llmjax.models.mapping import Entry, Family, Tensors
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.mlp import GLU
from llmjax.nn.model import Params
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope

Shape = tuple[int, int, int, int, int, float]

LLAMA1: dict[str, Shape] = {
    "7B": (32, 4096, 32, 32, 11008, 1e-6),
    "13B": (40, 5120, 40, 40, 13824, 1e-6),
    "33B": (60, 6656, 52, 52, 17920, 1e-6),
    "65B": (80, 8192, 64, 64, 22016, 1e-5),
}
"""layers, d_model, heads, kv_heads, d_ff, eps of the norms"""
LLAMA2: dict[str, Shape] = {
    "7B": (32, 4096, 32, 32, 11008, 1e-5),
    "13B": (40, 5120, 40, 40, 13824, 1e-5),
    "70B": (80, 8192, 64, 8, 28672, 1e-5),
}
"""as LLAMA1; only the largest groups its queries (Touvron et al. 2023, 2307.09288)"""
LLAMA3: dict[str, Shape] = {
    "8B": (32, 4096, 32, 8, 14336, 1e-5),
    "70B": (80, 8192, 64, 8, 28672, 1e-5),
}
"""as LLAMA1 (Llama team 2024, 2407.21783)"""


def llama1(size: Literal["7B", "13B", "33B", "65B"] = "7B", vocab: int = 32000) -> Decoder:
    """The config of a LLaMA 1 model (trained on 2,048 tokens); raises InputError for an unknown size."""
    return _llama("LLaMA 1", LLAMA1, size, vocab, base=10_000.0)


def llama2(size: Literal["7B", "13B", "70B"] = "7B", vocab: int = 32000) -> Decoder:
    """The config of a Llama 2 model (trained on 4,096 tokens); raises InputError for an unknown size."""
    return _llama("Llama 2", LLAMA2, size, vocab, base=10_000.0)


def llama3(size: Literal["8B", "70B"] = "8B", vocab: int = 128256) -> Decoder:
    """The config of a Llama 3 model (trained on 8,192 tokens); raises InputError for an unknown size."""
    return _llama("Llama 3", LLAMA3, size, vocab, base=500_000.0)


def _llama(name: str, sizes: dict[str, Shape], size: str, vocab: int, base: float) -> Decoder:
    if size not in sizes:
        raise InputError(f"unknown {name} size {size!r}: use {', '.join(sizes)}")
    layers, d_model, heads, kv_heads, d_ff, eps = sizes[size]
    block = Block(
        mixer=Attention(heads=heads, kv_heads=kv_heads, rope=Rope(base=base)),
        mlp=GLU(d_ff=d_ff, activation="silu"),
        norm=RMSNorm(eps=eps),
    )
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(block,),
        norm=RMSNorm(eps=eps),
        tied=False,
        initializer=LlamaInit(),
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `llama` config.json; raises InputError for ill-typed values and for scaled rotary positions."""
    norm = RMSNorm(eps=mapping.setting(theirs, "rms_norm_eps", 1e-6))
    heads, d_model = mapping.setting(theirs, "num_attention_heads", 32), mapping.setting(theirs, "hidden_size", 4096)
    bias = mapping.setting(theirs, "attention_bias", False)
    block = Block(
        mixer=Attention(
            heads=heads,
            kv_heads=mapping.setting(theirs, "num_key_value_heads", heads),
            head_dim=mapping.setting(theirs, "head_dim", d_model // max(heads, 1)),
            rope=Rope(base=_rope_base(theirs)),
            bias=bias,
            out_bias=bias,
        ),
        mlp=GLU(
            d_ff=mapping.setting(theirs, "intermediate_size", 11008),
            activation=mapping.activation_of(theirs, "hidden_act", "silu"),
            bias=mapping.setting(theirs, "mlp_bias", False),
        ),
        norm=norm,
    )
    config = Decoder(
        vocab=mapping.setting(theirs, "vocab_size", 32000),
        d_model=d_model,
        layers=mapping.setting(theirs, "num_hidden_layers", 32),
        pattern=(block,),
        norm=norm,
        tied=mapping.setting(theirs, "tie_word_embeddings", False),
        initializer=LlamaInit(std=mapping.setting(theirs, "initializer_range", 0.02)),
    )
    return mapping.checked(config)


def _rope_base(theirs: Mapping[str, Any]) -> float:
    """The wavelength base; it stands in `rope_parameters` since transformers 5, in `rope_theta` before."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = theirs.get(key) or {}
        if not isinstance(value, Mapping):
            raise InputError(f"config.json: {key}={value!r}: expected an object")
        rope |= value
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"config.json: rope_type={kind!r} is not supported: only 'default' (no scaling) is")
    return mapping.setting(rope, "rope_theta", mapping.setting(theirs, "rope_theta", 10_000.0))


def to_hf_config(config: Decoder) -> dict[str, Any]:
    """The `llama` config.json of our config; raises InputError where LLaMA cannot say what it holds."""
    block, mixer, mlp = mapping.parts(config, "llama", GLU)
    heads, kv_heads, head_dim = mixer.sizes(config.d_model)
    base = mixer.rope.base if mixer.rope else 10_000.0
    theirs = {
        "model_type": "llama",
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp.d_ff,
        "hidden_act": mapping.activation_name(mlp.activation),
        "rms_norm_eps": getattr(block.norm, "eps", 1e-6),
        "attention_bias": mixer.bias,
        "mlp_bias": mlp.bias,
        "tie_word_embeddings": config.tied,
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return mapping.expressible(config, theirs, FAMILY)


def table(config: Decoder) -> tuple[Entry, ...]:
    """Linear kernels are [outputs, inputs]; queries and keys pair feature i with i + head_dim / 2.

    Where our config pairs neighbours (as the LLaMA paper's own code does), those features are put side by side.
    """
    _, mixer, mlp = mapping.parts(config, "llama", GLU)
    rope = config.pattern[0].mixer.rope if isinstance(config.pattern[0].mixer, Attention) else None
    turned = ("(h two p)", "h (p two)") if rope and rope.layout == "interleaved" else ("(h k)", "h k")
    layer = "model.layers.{i}."
    projections: list[Entry] = []
    for ours, theirs, (flat, split) in (
        ("query", "q_proj", turned),
        ("key", "k_proj", turned),
        ("value", "v_proj", ("(h k)", "h k")),
    ):
        name = f"{layer}self_attn.{theirs}."
        projections.append(Entry((f"mixer/{ours}/kernel",), name + "weight", f"{flat} d -> d {split}"))
        if mixer.bias:
            projections.append(Entry((f"mixer/{ours}/bias",), name + "bias", f"{flat} -> {split}"))
    projections.append(Entry(("mixer/out/kernel",), layer + "self_attn.o_proj.weight", "d (h k) -> h k d"))
    if mixer.out_bias:
        projections.append(Entry(("mixer/out/bias",), layer + "self_attn.o_proj.bias", "d -> d"))
    for name in ("gate", "up", "down"):
        projections.append(Entry((f"mlp/{name}/kernel",), f"{layer}mlp.{name}_proj.weight", "o i -> i o"))
        if mlp.bias:
            projections.append(Entry((f"mlp/{name}/bias",), f"{layer}mlp.{name}_proj.bias", "o -> o"))
    head = () if config.tied else (Entry(("head/kernel",), "lm_head.weight", "v d -> d v"),)
    return (
        Entry(("embed/embedding",), "model.embed_tokens.weight", "v d -> v d"),
        *projections,
        Entry(("mixer_norm/scale",), layer + "input_layernorm.weight", "d -> d"),
        Entry(("mlp_norm/scale",), layer + "post_attention_layernorm.weight", "d -> d"),
        Entry(("norm/scale",), "model.norm.weight", "d -> d"),
        *head,
    )


def import_weights(tensors: Tensors, config: Decoder) -> Params:
    """Float32 parameters from transformers' tensors; see `llmjax.models.mapping.import_weights`."""
    return mapping.import_weights(tensors, config, FAMILY)


def export_weights(params: Params, config: Decoder) -> dict[str, np.ndarray]:
    """transformers' tensors from parameters; see `llmjax.models.mapping.export_weights`."""
    return mapping.export_weights(params, config, FAMILY)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    ignored=r"rotary_emb\.inv_freq$",
    extra=("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"),
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
)
