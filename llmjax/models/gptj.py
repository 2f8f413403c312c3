"""GPT-J: one norm for both branches, the first features of a head rotate in neighbouring pairs, a head with a bias.

Wang and Komatsuzaki 2021.
"""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.gpt_neox import layer_norm
from llmjax.models.llama import turned
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import Their, activation_name, activation_of, checked, expressible, first, setting
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mlp import MLP
from llmjax.nn.norms import LayerNorm
from llmjax.nn.rope import Rope


def gptj(size: Literal["6B"] = "6B") -> Decoder:
    """The config of GPT-J; raises InputError for an unknown size."""
    if size != "6B":
        raise InputError(f"unknown GPT-J size {size!r}: use 6B")
    block = Block(
        mixer=Attention(heads=16, rope=Rope(layout="interleaved", fraction=0.25)),
        mlp=MLP(activation="gelu_tanh", bias=True),
        norm=LayerNorm(),
        order="parallel",
    )
    return Decoder(
        vocab=50400, d_model=4096, layers=28, pattern=(block,), norm=LayerNorm(), head_bias=True, initializer=GPT2Init()
    )


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `gptj` config.json; raises InputError for ill-typed values."""
    norm = LayerNorm(eps=setting(theirs, "layer_norm_epsilon", 1e-5))
    heads, d_model = setting(theirs, "n_head", 16), setting(theirs, "n_embd", 4096)
    head_dim = d_model // max(heads, 1)
    rope = Rope(layout="interleaved", fraction=setting(theirs, "rotary_dim", 64) / max(head_dim, 1))
    block = Block(
        mixer=Attention(heads=heads, rope=rope),
        mlp=MLP(
            d_ff=setting(theirs, "n_inner", 4 * d_model),
            activation=activation_of(theirs, "activation_function", "gelu_new"),
            bias=True,
        ),
        norm=norm,
        order="parallel",
        dropout=setting(theirs, "resid_pdrop", 0.0),
    )
    tied = setting(theirs, "tie_word_embeddings", False)
    config = Decoder(
        vocab=setting(theirs, "vocab_size", 50400),
        d_model=d_model,
        layers=setting(theirs, "n_layer", 28),
        pattern=(block,),
        norm=norm,
        tied=tied,
        head_bias=not tied,
        dropout=setting(theirs, "embd_pdrop", 0.0),
        initializer=GPT2Init(std=setting(theirs, "initializer_range", 0.02)),
    )
    return checked(config)


def to_hf_config(config: Decoder) -> Their:
    """The `gptj` config.json of our config; raises InputError where GPT-J cannot say what it holds."""
    block, mixer, mlp = first(config, "gptj", Attention, MLP)
    rope = mixer.rope or Rope()
    theirs = {
        "model_type": "gptj",
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "n_embd": config.d_model,
        "n_layer": config.layers,
        "n_head": mixer.heads,
        "n_inner": mlp.d_ff,
        "rotary_dim": rope.rotated(mixer.head_dim),
        "activation_function": activation_name(mlp.activation),
        "layer_norm_epsilon": getattr(block.norm, "eps", 1e-5),
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.pattern[0].dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return expressible(config, theirs, "gptj", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """Attention has no biases, everything else has."""
    flat, split, sizes = turned(config, "interleaved")
    block = [
        *layer_norm("mixer_norm", "ln_1"),
        Entry(("mixer/query/kernel",), "attn.q_proj.weight", f"{flat} d -> d {split}", sizes),
        Entry(("mixer/key/kernel",), "attn.k_proj.weight", f"{flat} d -> d {split}", sizes),
        Entry(("mixer/value/kernel",), "attn.v_proj.weight", "(h k) d -> d h k"),
        Entry(("mixer/out/kernel",), "attn.out_proj.weight", "d (h k) -> h k d"),
        Entry(("mlp/up/kernel",), "mlp.fc_in.weight", "o i -> i o"),
        Entry(("mlp/up/bias",), "mlp.fc_in.bias", "o -> o"),
        Entry(("mlp/down/kernel",), "mlp.fc_out.weight", "o i -> i o"),
        Entry(("mlp/down/bias",), "mlp.fc_out.bias", "o -> o"),
    ]
    head = (Entry(("head/kernel",), "lm_head.weight", "v d -> d v"), Entry(("head_bias",), "lm_head.bias", "v -> v"))
    return (
        Entry(("embed/embedding",), "transformer.wte.weight", "v d -> v d"),
        *(entry.at("blocks/*/", "transformer.h.{i}.") for entry in block),
        *layer_norm("norm", "transformer.ln_f"),
        *(() if config.tied else head),
    )


FAMILY = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    prefix="transformer.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    ignored=r"attn\.(masked_bias|bias|embed_positions)$",
    extra=("bos_token_id", "eos_token_id", "pad_token_id", "n_positions"),
)
