"""T5 and T5 1.1: an encoder and a decoder with biases by distance, RMSNorm, no other biases. Raffel et al. 2019.

Version 1.1 has GeGLU and does not scale the states before its head, which is a matrix of its own (Shazeer 2020).
"""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import (
    ACTIVATIONS,
    Their,
    activation_name,
    canonical,
    checked,
    expressible,
    setting,
)
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.encoder_decoder import EncoderDecoder, Tower
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.norms import RMSNorm
from llmjax.nn.t5_bias import T5Bias

Shape = tuple[int, int, int, int, int]

SIZES: dict[str, Shape] = {
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3B": (24, 1024, 32, 128, 16384),
    "11B": (24, 1024, 128, 128, 65536),
}
"""layers of either stack, d_model, heads, head_dim, d_ff"""
SIZES11: dict[str, Shape] = {
    "small": (8, 512, 6, 64, 1024),
    "base": (12, 768, 12, 64, 2048),
    "large": (24, 1024, 16, 64, 2816),
    "XL": (24, 2048, 32, 64, 5120),
    "XXL": (24, 4096, 64, 64, 10240),
}
"""as SIZES, of version 1.1"""
PARTS = {"query": "q", "key": "k", "value": "v"}


def t5(size: Literal["small", "base", "large", "3B", "11B"] = "small", vocab: int = 32128) -> EncoderDecoder:
    """The config of a T5 model; raises InputError for an unknown size."""
    return _t5("T5", SIZES, size, vocab, {})


def t5_v11(size: Literal["small", "base", "large", "XL", "XXL"] = "small", vocab: int = 32128) -> EncoderDecoder:
    """The config of a T5 1.1 model (Flan-T5's too); raises InputError for an unknown size."""
    return _t5("T5 1.1", SIZES11, size, vocab, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})


def _t5(name: str, sizes: dict[str, Shape], size: str, vocab: int, own: Their) -> EncoderDecoder:
    if size not in sizes:
        raise InputError(f"unknown {name} size {size!r}: use {', '.join(sizes)}")
    layers, d_model, heads, head_dim, d_ff = sizes[size]
    named = {"num_layers": layers, "d_model": d_model, "num_heads": heads, "d_kv": head_dim, "d_ff": d_ff}
    return from_hf_config(named | {"vocab_size": vocab} | own)


def from_hf_config(theirs: Mapping[str, Any]) -> EncoderDecoder:
    """Our config of a `t5` config.json; raises InputError for ill-typed values."""
    heads: Any = {"heads": setting(theirs, "num_heads", 8), "head_dim": setting(theirs, "d_kv", 64), "scale": 1.0}
    norm = RMSNorm(eps=setting(theirs, "layer_norm_epsilon", 1e-6))
    layers, dropout = setting(theirs, "num_layers", 6), setting(theirs, "dropout_rate", 0.1)
    distance = T5Bias(
        setting(theirs, "relative_attention_num_buckets", 32), setting(theirs, "relative_attention_max_distance", 128)
    )
    stack: Any = {"d_model": setting(theirs, "d_model", 512), "norm": norm, "distance": distance, "dropout": dropout}
    rest: Any = {"mlp": _mlp(theirs), "norm": norm, "dropout": dropout}
    reader = Block(mixer=Attention(causal=False, rope=None, **heads), **rest)
    writer = Block(mixer=Attention(rope=None, **heads), cross=CrossAttention(**heads), **rest)
    tied = setting(theirs, "tie_word_embeddings", True)
    config = EncoderDecoder(
        vocab=setting(theirs, "vocab_size", 32128),
        encoder=Tower(layers=layers, pattern=(reader,), **stack),
        decoder=Tower(layers=setting(theirs, "num_decoder_layers", layers), pattern=(writer,), **stack),
        tied=tied,
        scaled=setting(theirs, "scale_decoder_outputs", tied),
    )
    return checked(config)


def _mlp(theirs: Mapping[str, Any]) -> MLP | GLU:
    """`relu`, `gated-gelu` (in which gelu means its tanh form) and the like."""
    name, d_ff = setting(theirs, "feed_forward_proj", "relu"), setting(theirs, "d_ff", 2048)
    plain = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
    if plain not in ACTIVATIONS:
        raise InputError(f"config.json: feed_forward_proj={name!r} is not supported: {', '.join(ACTIVATIONS)} are")
    kind = GLU if name.startswith("gated-") else MLP
    return kind(d_ff=d_ff, activation=ACTIVATIONS[plain])


def to_hf_config(config: EncoderDecoder) -> Their:
    """The `t5` config.json of our config; raises InputError where T5 cannot say what it holds."""
    towers = [canonical(getattr(config, name, None)) for name in ("encoder", "decoder")]
    block = towers[0].pattern[0] if isinstance(config, EncoderDecoder) else None
    if block is None or not isinstance(block.mixer, Attention) or not isinstance(block.mlp, MLP | GLU):
        raise InputError(f"{type(config).__name__} cannot be said in a t5 config.json: it has towers of attention")
    distance, name = config.encoder.distance, activation_name(block.mlp.activation)
    gated = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
    theirs = {
        "model_type": FAMILY.model_type,
        "architectures": [FAMILY.architecture],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab,
        "d_model": config.encoder.d_model,
        "d_kv": block.mixer.head_dim,
        "d_ff": block.mlp.d_ff,
        "num_layers": config.encoder.layers,
        "num_decoder_layers": config.decoder.layers,
        "num_heads": block.mixer.heads,
        "relative_attention_num_buckets": getattr(distance, "buckets", 32),
        "relative_attention_max_distance": getattr(distance, "max_distance", 128),
        "feed_forward_proj": gated if isinstance(block.mlp, GLU) else name,
        "layer_norm_epsilon": getattr(block.norm, "eps", 1e-6),
        "dropout_rate": config.encoder.dropout,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scaled,
        "decoder_start_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return expressible(config, theirs, "t5", from_hf_config)


def table(config: EncoderDecoder) -> tuple[Entry, ...]:
    """The branches of a block are numbered; the bias by distance is the first block's."""
    found = [Entry(("embed/embedding",), "shared.weight", "v d -> v d")]
    for tower, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        found += [entry.at(f"{tower}/", f"{tower}.") for entry in _tower(stack)]
    return (*found, *(() if config.tied else (Entry(("head/kernel",), "lm_head.weight", "v d -> d v"),)))


def _tower(stack: Tower) -> list[Entry]:
    block = stack.pattern[0]
    gated = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    dense = gated if isinstance(block.mlp, GLU) else {"up": "wi", "down": "wo"}
    branches = {"mixer": "SelfAttention", **({} if block.cross is None else {"cross": "EncDecAttention"})}
    found = [
        Entry(("distance/embedding",), "block.0.layer.0.SelfAttention.relative_attention_bias.weight", "b h -> h b"),
        Entry(("norm/scale",), "final_layer_norm.weight", "d -> d"),
    ]
    for at, (ours, theirs) in enumerate([*branches.items(), ("mlp", "DenseReluDense")]):
        parts = [Entry((f"{ours}_norm/scale",), "layer_norm.weight", "d -> d")]
        if ours == "mlp":
            parts += [Entry((f"mlp/{n}/kernel",), f"{theirs}.{t}.weight", "o i -> i o") for n, t in dense.items()]
        else:
            split = "(h k) d -> d h k"
            parts += [Entry((f"{ours}/{n}/kernel",), f"{theirs}.{t}.weight", split) for n, t in PARTS.items()]
            parts.append(Entry((f"{ours}/out/kernel",), f"{theirs}.o.weight", "d (h k) -> h k d"))
        found += [entry.at("blocks/*/", f"block.{{i}}.layer.{at}.") for entry in parts]
    return found


FAMILY = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    ignored=r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    copies={f"{name}.weight": "shared.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
    extra=("eos_token_id", "pad_token_id", "decoder_start_token_id"),
)
