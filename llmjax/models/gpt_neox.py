"""GPT-NeoX and Pythia: both branches read the same stream through norms of their own; a quarter of a head rotates.

Black et al. 2022 (2204.06745); Biderman et al. 2023 (2304.01373).
"""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.llama import require_layout
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import parameters_of, rope_of
from llmjax.models.settings import Their, activation_name, activation_of, checked, expressible, first, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mlp import MLP
from llmjax.nn.norms import LayerNorm
from llmjax.nn.rope import Rope

Size = Literal["70M", "160M", "410M", "1B", "1.4B", "2.8B", "6.9B", "12B", "20B"]

SIZES: dict[str, tuple[int, int, int, int]] = {
    "70M": (6, 512, 8, 50304),
    "160M": (12, 768, 12, 50304),
    "410M": (24, 1024, 16, 50304),
    "1B": (16, 2048, 8, 50304),
    "1.4B": (24, 2048, 16, 50304),
    "2.8B": (32, 2560, 32, 50304),
    "6.9B": (32, 4096, 32, 50432),
    "12B": (36, 5120, 40, 50688),
    "20B": (44, 6144, 64, 50432),
}
"""layers, d_model, heads, vocabulary; Pythia's sizes and GPT-NeoX 20B"""
DENSE = {
    "mixer/out": ("attention.dense", "d (h k) -> h k d"),
    "mlp/up": ("mlp.dense_h_to_4h", "o i -> i o"),
    "mlp/down": ("mlp.dense_4h_to_h", "o i -> i o"),
}
"""projections: their name and axes"""


def gpt_neox(size: Size = "70M") -> Decoder:
    """The config of a Pythia model or of GPT-NeoX 20B; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown GPT-NeoX size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads, vocab = SIZES[size]
    block = Block(
        mixer=Attention(heads=heads, rope=Rope(fraction=0.25), bias=True, out_bias=True),
        mlp=MLP(activation="gelu_tanh" if size == "20B" else "gelu", bias=True),
        norm=LayerNorm(),
        order="parallel_norms",
    )
    return Decoder(
        vocab=vocab, d_model=d_model, layers=layers, pattern=(block,), norm=LayerNorm(), initializer=GPT2Init()
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `gpt_neox` config.json; raises InputError for ill-typed values."""
    norm = LayerNorm(eps=setting(theirs, "layer_norm_eps", 1e-5))
    base, fraction = setting(theirs, "rotary_emb_base", 10_000.0), setting(theirs, "rotary_pct", 0.25)
    bias = setting(theirs, "attention_bias", True)
    block = Block(
        mixer=Attention(
            heads=setting(theirs, "num_attention_heads", 64),
            rope=rope_of(theirs, base=base, fraction=fraction),
            bias=bias,
            out_bias=bias,
        ),
        mlp=MLP(
            d_ff=setting(theirs, "intermediate_size", 24576),
            activation=activation_of(theirs, "hidden_act", "gelu"),
            bias=True,
        ),
        norm=norm,
        order="parallel_norms" if setting(theirs, "use_parallel_residual", True) else "pre",
        dropout=setting(theirs, "hidden_dropout", 0.0),
    )
    config = Decoder(
        vocab=setting(theirs, "vocab_size", 50432),
        d_model=setting(theirs, "hidden_size", 6144),
        layers=setting(theirs, "num_hidden_layers", 44),
        pattern=(block,),
        norm=norm,
        tied=setting(theirs, "tie_word_embeddings", False),
        initializer=GPT2Init(std=setting(theirs, "initializer_range", 0.02)),
    )
    return checked(config)


def to_hf_config(config: Decoder) -> Their:
    """The `gpt_neox` config.json of our config; raises InputError where GPT-NeoX cannot say what it holds."""
    block, mixer, mlp = first(config, "gpt_neox", Attention, MLP)
    rope = mixer.rope or Rope()
    theirs = {
        "model_type": "gpt_neox",
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": mixer.heads,
        "intermediate_size": mlp.d_ff,
        "hidden_act": activation_name(mlp.activation),
        "layer_norm_eps": getattr(block.norm, "eps", 1e-5),
        "attention_bias": mixer.bias,
        "use_parallel_residual": block.order == "parallel_norms",
        "tie_word_embeddings": config.tied,
        "rotary_emb_base": rope.base,
        "rotary_pct": rope.fraction,
        "rope_parameters": parameters_of(rope) | {"partial_rotary_factor": rope.fraction},
        "hidden_dropout": config.pattern[0].dropout,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return expressible(config, theirs, "gpt_neox", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """Queries, keys and values are one tensor, head by head; everything has a bias."""
    require_layout(config, "half")
    block = [
        *fused(config, "attention.query_key_value"),
        *(Entry((f"{ours}/kernel",), f"{theirs}.weight", axes) for ours, (theirs, axes) in DENSE.items()),
        *(Entry((f"{ours}/bias",), f"{theirs}.bias", "o -> o") for ours, (theirs, _) in biased(config, DENSE).items()),
        *layer_norm("mixer_norm", "input_layernorm"),
        *layer_norm("mlp_norm", "post_attention_layernorm"),
    ]
    return (
        Entry(("embed/embedding",), "gpt_neox.embed_in.weight", "v d -> v d"),
        *(entry.at("blocks/*/", "gpt_neox.layers.{i}.") for entry in block),
        *layer_norm("norm", "gpt_neox.final_layer_norm"),
        *(() if config.tied else (Entry(("head/kernel",), "embed_out.weight", "v d -> d v"),)),
    )


def fused(config: Decoder, name: str) -> list[Entry]:
    """Queries, keys and values as one tensor, head by head."""
    mixer: Any = config.pattern[0].mixer
    kernels, biases = ([f"mixer/{part}/{kind}" for part in ("query", "key", "value")] for kind in ("kernel", "bias"))
    found = [Entry(tuple(kernels), f"{name}.weight", "(h [k]) d -> d h k")]
    return [*found, Entry(tuple(biases), f"{name}.bias", "(h [k]) -> h k")] if mixer.bias else found


def biased(config: Decoder, dense: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Those of the projections that have a bias."""
    mixer, mlp = config.pattern[0].mixer, config.pattern[0].mlp
    has = {"mixer": getattr(mixer, "out_bias", False), "mlp": getattr(mlp, "bias", False)}
    return {ours: theirs for ours, theirs in dense.items() if has[ours.split("/")[0]]}


def layer_norm(ours: str, theirs: str) -> list[Entry]:
    """Scale and shift."""
    return [
        Entry((f"{ours}/scale",), f"{theirs}.weight", "d -> d"),
        Entry((f"{ours}/bias",), f"{theirs}.bias", "d -> d"),
    ]


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    ignored=r"attention\.(masked_bias|bias|rotary_emb\.inv_freq)$",
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    renamed={r"^lm_head\.": "embed_out."},
)
