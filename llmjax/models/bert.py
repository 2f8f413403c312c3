"""BERT: an encoder with norms after its branches, a head for masked tokens and one that tells whether texts follow.

Devlin et al. 2018 (1810.04805).
"""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.gpt_neox import layer_norm
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import (
    Their,
    activation_name,
    activation_of,
    architecture_of,
    checked,
    expressible,
    first,
    require,
    setting,
)
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.encoder import Encoder, MaskedHead
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mlp import MLP
from llmjax.nn.norms import LayerNorm
from llmjax.nn.positions import LearnedPositions

SIZES: dict[str, tuple[int, int, int]] = {"base": (12, 768, 12), "large": (24, 1024, 16)}
"""layers, d_model, heads"""
HEADS: dict[str, tuple[bool, bool, int]] = {
    "BertForPreTraining": (True, True, 2),
    "BertForMaskedLM": (True, False, 0),
    "BertForNextSentencePrediction": (False, True, 2),
    "BertModel": (False, True, 0),
}
"""their class: whether it has a head for masked tokens, whether a pooler, classes of rows"""
DENSE = {
    "mixer/query": ("attention.self.query", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/key": ("attention.self.key", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/value": ("attention.self.value", "(h k) d -> d h k", "(h k) -> h k"),
    "mixer/out": ("attention.output.dense", "d (h k) -> h k d", "d -> d"),
    "mlp/up": ("intermediate.dense", "o i -> i o", "o -> o"),
    "mlp/down": ("output.dense", "o i -> i o", "o -> o"),
}
"""projections of a block: their name, the axes of their weight and of their bias"""


def bert(size: Literal["base", "large"] = "base", vocab: int = 30522, architecture: str = "BertModel") -> Encoder:
    """The config of a BERT model (vocabulary: uncased 30,522, cased 28,996); raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown BERT size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads = SIZES[size]
    sizes = {"num_hidden_layers": layers, "hidden_size": d_model, "num_attention_heads": heads, "vocab_size": vocab}
    return from_hf_config(sizes | {"intermediate_size": 4 * d_model, "architectures": [architecture]})


def from_hf_config(theirs: Mapping[str, Any]) -> Encoder:
    """Our config of a `bert` config.json, whose `architectures` tells the heads; raises InputError."""
    require(theirs, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    require(theirs, tie_word_embeddings=True)
    masked, pooler, row_classes = HEADS[architecture_of(theirs, *HEADS)]
    norm, act = LayerNorm(eps=setting(theirs, "layer_norm_eps", 1e-12)), activation_of(theirs, "hidden_act", "gelu")
    mixer = Attention(setting(theirs, "num_attention_heads", 12), causal=False, rope=None, bias=True, out_bias=True)
    mlp = MLP(d_ff=setting(theirs, "intermediate_size", 3072), activation=act, bias=True)
    dropout = setting(theirs, "hidden_dropout_prob", 0.1)
    config = Encoder(
        vocab=setting(theirs, "vocab_size", 30522),
        d_model=setting(theirs, "hidden_size", 768),
        layers=setting(theirs, "num_hidden_layers", 12),
        pattern=(Block(mixer, mlp, norm, order="post", dropout=dropout),),
        norm=None,
        positions=LearnedPositions(setting(theirs, "max_position_embeddings", 512)),
        embedding_norm=norm,
        token_types=setting(theirs, "type_vocab_size", 2),
        pooler=pooler,
        row_classes=row_classes,
        head=MaskedHead(activation=act, norm=norm) if masked else None,
        dropout=dropout,
        initializer=GPT2Init(std=setting(theirs, "initializer_range", 0.02)),
    )
    return checked(config)


def to_hf_config(config: Encoder) -> Their:
    """The `bert` config.json of our config; raises InputError where BERT cannot say what it holds."""
    block, mixer, mlp = first(config, "bert", Attention, MLP, Encoder)
    heads = (config.head is not None, config.pooler, config.row_classes)
    if heads not in HEADS.values():
        raise InputError("head, pooler and row_classes cannot be said in a bert config.json: it has all or one of them")
    theirs = {
        "model_type": FAMILY.model_type,
        "architectures": [name for name, has in HEADS.items() if has == heads],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": mixer.heads,
        "intermediate_size": mlp.d_ff,
        "hidden_act": activation_name(mlp.activation),
        "layer_norm_eps": getattr(block.norm, "eps", 1e-12),
        "max_position_embeddings": getattr(config.positions, "length", 512),
        "type_vocab_size": config.token_types,
        "tie_word_embeddings": True,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return expressible(config, theirs, "bert", from_hf_config)


def table(config: Encoder) -> tuple[Entry, ...]:
    """The tensors of the model and of those heads that there are."""
    tables = {"embed": "word", "positions": "position", "types": "token_type"}
    block = [
        *(entry for ours, named in DENSE.items() for entry in dense(ours, *named)),
        *layer_norm("mixer_norm", "attention.output.LayerNorm"),
        *layer_norm("mlp_norm", "output.LayerNorm"),
    ]
    masked = [
        *dense("head/dense", "cls.predictions.transform.dense"),
        *layer_norm("head/norm", "cls.predictions.transform.LayerNorm"),
        Entry(("head/bias",), "cls.predictions.bias", "v -> v"),
    ]
    return (
        *(
            Entry((f"{ours}/embedding",), f"bert.embeddings.{name}_embeddings.weight", "v d -> v d")
            for ours, name in tables.items()
        ),
        *layer_norm("embedding_norm", "bert.embeddings.LayerNorm"),
        *(entry.at("blocks/*/", "bert.encoder.layer.{i}.") for entry in block),
        *(dense("pooler", "bert.pooler.dense") if config.pooler else ()),
        *(masked if config.head is not None else ()),
        *(dense("row_head", "cls.seq_relationship") if config.row_classes else ()),
    )


def dense(ours: str, theirs: str, kernel: str = "o i -> i o", bias: str = "o -> o") -> list[Entry]:
    """A projection with a bias."""
    return [
        Entry((f"{ours}/kernel",), f"{theirs}.weight", kernel),
        Entry((f"{ours}/bias",), f"{theirs}.bias", bias),
    ]


FAMILY = Family(
    model_type="bert",
    architecture="BertForPreTraining",
    prefix="bert.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    ignored=r"position_ids$|^(bert\.)?pooler\.|^cls\.(predictions|seq_relationship)\.(?!decoder)",
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    extra=("bos_token_id", "eos_token_id", "pad_token_id"),
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
)
