"""LLaMA 1 to 3: rotary positions, RMSNorm before each branch, SwiGLU, no biases. Touvron et al. 2023 (2302.13971).

Families that name their tensors and settings as LLaMA does are made of the same functions.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.mapping import Entry, Family
from llmjax.models.rotary import rope_of, rope_settings
from llmjax.models.settings import (
    Their,
    activation_name,
    activation_of,
    checked,
    expressible,
    first,
    setting,
)
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import LlamaInit
from llmjax.nn.masks import AttentionMask, Full, Window
from llmjax.nn.mlp import GLU
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope
from llmjax.nn.rope_scaling import Llama3

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
LLAMA31: dict[str, Shape] = LLAMA3 | {"405B": (126, 16384, 128, 8, 53248, 1e-5)}
"""as LLAMA3"""
LLAMA32: dict[str, Shape] = {"1B": (16, 2048, 32, 8, 8192, 1e-5), "3B": (28, 3072, 24, 8, 8192, 1e-5)}
"""as LLAMA1"""


def llama1(size: Literal["7B", "13B", "33B", "65B"] = "7B", vocab: int = 32000) -> Decoder:
    """The config of a LLaMA 1 model (trained on 2,048 tokens); raises InputError for an unknown size."""
    return _llama("LLaMA 1", LLAMA1, size, vocab, base=10_000.0)


def llama2(size: Literal["7B", "13B", "70B"] = "7B", vocab: int = 32000) -> Decoder:
    """The config of a Llama 2 model (trained on 4,096 tokens); raises InputError for an unknown size."""
    return _llama("Llama 2", LLAMA2, size, vocab, base=10_000.0)


def llama3(size: Literal["8B", "70B"] = "8B", vocab: int = 128256) -> Decoder:
    """The config of a Llama 3 model (trained on 8,192 tokens); raises InputError for an unknown size."""
    return _llama("Llama 3", LLAMA3, size, vocab, base=500_000.0)


def llama31(size: Literal["8B", "70B", "405B"] = "8B", vocab: int = 128256) -> Decoder:
    """The config of a Llama 3.1 model (Llama 3 on 131,072 tokens); raises InputError for an unknown size."""
    return _llama("Llama 3.1", LLAMA31, size, vocab, base=500_000.0, scaling=Llama3(factor=8.0))


def llama32(size: Literal["1B", "3B"] = "1B", vocab: int = 128256) -> Decoder:
    """The config of a Llama 3.2 text model, its head tied; raises InputError for an unknown size."""
    config = _llama("Llama 3.2", LLAMA32, size, vocab, base=500_000.0, scaling=Llama3(factor=32.0))
    return replace(config, tied=True)


def _llama(
    name: str, sizes: dict[str, Shape], size: str, vocab: int, base: float, scaling: Llama3 | None = None
) -> Decoder:
    if size not in sizes:
        raise InputError(f"unknown {name} size {size!r}: use {', '.join(sizes)}")
    layers, d_model, heads, kv_heads, d_ff, eps = sizes[size]
    block = Block(
        mixer=Attention(heads=heads, kv_heads=kv_heads, rope=Rope(base=base, scaling=scaling)),
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


NORMS = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""norms of a block: our name, their name"""


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `llama` config.json; raises InputError for ill-typed values and unknown rotary scaling."""
    mixer = attention_of(theirs, rope=rope_of(theirs))
    return decoder_of(theirs, Block(mixer=mixer, mlp=glu_of(theirs), norm=rms_norm_of(theirs)))


def attention_of(theirs: Mapping[str, Any], **own: Any) -> Attention:
    """Our attention of a config.json with LLaMA's keys; `own` are fields that the family has in another way."""
    heads, d_model = setting(theirs, "num_attention_heads", 32), setting(theirs, "hidden_size", 4096)
    bias = setting(theirs, "attention_bias", False)
    usual: dict[str, Any] = {
        "heads": heads,
        "kv_heads": setting(theirs, "num_key_value_heads", heads),
        "head_dim": setting(theirs, "head_dim", d_model // max(heads, 1)),
        "bias": bias,
        "out_bias": bias,
    }
    return Attention(**(usual | own))


def glu_of(theirs: Mapping[str, Any], key: str = "hidden_act", usual: str = "silu") -> GLU:
    """Our gated layer, its activation standing under `key`."""
    d_ff, bias = setting(theirs, "intermediate_size", 11008), setting(theirs, "mlp_bias", False)
    return GLU(d_ff=d_ff, activation=activation_of(theirs, key, usual), bias=bias)


def mask_of(window: int | None) -> AttentionMask:
    """All of the past, or the last `window` tokens of it."""
    return Full() if window is None else Window(window)


def window_of(config: Decoder) -> int | None:
    """Tokens that the layers of local attention see; None where there is no such layer."""
    masks = [getattr(block.mixer, "mask", None) for block in config.pattern]
    return next((mask.size for mask in masks if isinstance(mask, Window)), None)


def attending(block: Block, **fields: Any) -> Block:
    """The block with other fields of its attention."""
    mixer: Any = block.mixer
    return replace(block, mixer=replace(mixer, **fields))


def kind_of(block: Block) -> str:
    """What `layer_types` calls a layer's attention."""
    return "sliding_attention" if isinstance(getattr(block.mixer, "mask", None), Window) else "full_attention"


def rms_norm_of(theirs: Mapping[str, Any], zero_centred: bool = False) -> RMSNorm:
    """Our norm."""
    return RMSNorm(eps=setting(theirs, "rms_norm_eps", 1e-6), zero_centred=zero_centred)


def decoder_of(theirs: Mapping[str, Any], *pattern: Block, tied: bool = False, **own: Any) -> Decoder:
    """Our model of these blocks, checked; `tied` where the file does not say, `own` are further fields."""
    config = Decoder(
        vocab=setting(theirs, "vocab_size", 32000),
        d_model=setting(theirs, "hidden_size", 4096),
        layers=setting(theirs, "num_hidden_layers", 32),
        pattern=pattern,
        norm=pattern[0].norm,
        tied=setting(theirs, "tie_word_embeddings", tied),
        initializer=LlamaInit(std=setting(theirs, "initializer_range", 0.02)),
        **own,
    )
    return checked(config)


def to_hf_config(config: Decoder) -> Their:
    """The `llama` config.json of our config; raises InputError where LLaMA cannot say what it holds."""
    _, mixer, mlp = first(config, "llama", Attention, GLU)
    theirs = settings_of(config, FAMILY) | {"attention_bias": mixer.bias, "mlp_bias": mlp.bias}
    return expressible(config, theirs, "llama", from_hf_config)


def settings_of(config: Decoder, family: Family) -> Their:
    """The keys that LLaMA's config.json and its likes have, from the first block."""
    block, mixer, mlp = first(config, family.model_type, Attention, GLU)
    return {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "intermediate_size": mlp.d_ff,
        "hidden_act": activation_name(mlp.activation),
        "rms_norm_eps": getattr(block.norm, "eps", 1e-6),
        "tie_word_embeddings": config.tied,
        **rope_settings(mixer.rope),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def table(config: Decoder, norms: Mapping[str, str] = NORMS) -> tuple[Entry, ...]:
    """The tensors of a LLaMA, or of a model that names them so."""
    return whole(config, [*attention_table(config), *glu_table(config), *norm_table(norms)])


def whole(config: Decoder, block: list[Entry]) -> tuple[Entry, ...]:
    """The tensors of a model, from those of a block."""
    return (*outside(config), *(entry.at("blocks/*/", "model.layers.{i}.") for entry in block))


def outside(config: Decoder) -> list[Entry]:
    """Tensors that belong to no layer."""
    return [
        Entry(("embed/embedding",), "model.embed_tokens.weight", "v d -> v d"),
        Entry(("norm/scale",), "model.norm.weight", "d -> d"),
        *([] if config.tied else [Entry(("head/kernel",), "lm_head.weight", "v d -> d v")]),
    ]


def norm_table(norms: Mapping[str, str]) -> list[Entry]:
    """Norms of a block."""
    return [Entry((f"{ours}/scale",), f"{theirs}.weight", "d -> d") for ours, theirs in norms.items()]


def attention_table(config: Decoder) -> list[Entry]:
    """Projections of attention: kernels are [outputs, inputs]; queries and keys pair feature i with i + head_dim / 2.

    Where our config pairs neighbours (as the LLaMA paper's own code does), those features are put side by side.
    """
    mixer: Any = config.pattern[0].mixer
    flat, split, sizes = turned(config)
    if sizes and mixer.qk_norm is not None:
        raise InputError("pattern: rope.layout cannot be changed beside qk_norm: its scales are by feature")
    found: list[Entry] = []
    for ours, theirs, left, right, known in (
        ("query", "q_proj", flat, split, sizes),
        ("key", "k_proj", flat, split, sizes),
        ("value", "v_proj", "(h k)", "h k", ()),
    ):
        found.append(Entry((f"mixer/{ours}/kernel",), f"self_attn.{theirs}.weight", f"{left} d -> d {right}", known))
        if mixer.bias:
            found.append(Entry((f"mixer/{ours}/bias",), f"self_attn.{theirs}.bias", f"{left} -> {right}", known))
        if mixer.qk_norm is not None and ours != "value":
            found.append(Entry((f"mixer/{ours}_norm/scale",), f"self_attn.{theirs[0]}_norm.weight", "k -> k"))
    found.append(Entry(("mixer/out/kernel",), "self_attn.o_proj.weight", "d (h k) -> h k d"))
    if mixer.out_bias:
        found.append(Entry(("mixer/out/bias",), "self_attn.o_proj.bias", "d -> d"))
    return found


def require_layout(config: Decoder, layout: str) -> None:
    """Raise InputError where our config pairs other features than theirs does, and fused tensors cannot undo it."""
    for i, block in enumerate(config.pattern):
        rope = getattr(block.mixer, "rope", None)
        if rope is not None and rope.layout != layout:
            raise InputError(f"pattern.{i}.mixer.rope.layout={rope.layout} cannot be undone here: use {layout}")


def turned(config: Decoder, native: str = "half") -> tuple[str, str, tuple[tuple[str, int], ...]]:
    """Axes of a head's queries and keys in theirs and in ours, and their sizes, theirs having planes as in `native`."""
    mixers: list[Any] = [block.mixer for block in config.pattern]
    layouts = {mixer.rope.layout for mixer in mixers if mixer.rope is not None}
    if len(layouts) > 1:
        raise InputError("pattern: rope.layout differs between blocks: give all of them one")
    if not layouts or layouts == {native}:
        return "(h k)", "h k", ()
    two = (("two", 2),)
    return ("(h two p)", "h (p two)", two) if native == "half" else ("(h p two)", "h (two p)", two)


def glu_table(config: Decoder) -> list[Entry]:
    """Projections of a gated layer."""
    mlp: Any = config.pattern[0].mlp
    found = [Entry((f"mlp/{n}/kernel",), f"mlp.{n}_proj.weight", "o i -> i o") for n in ("gate", "up", "down")]
    biases = [Entry((f"mlp/{n}/bias",), f"mlp.{n}_proj.bias", "o -> o") for n in ("gate", "up", "down")]
    return found + biases if mlp.bias else found


TIED = {"lm_head.weight": "model.embed_tokens.weight"}

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=TIED,
)
