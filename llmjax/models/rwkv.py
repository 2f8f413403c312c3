"""RWKV-4: time mixing and channel mixing in turn, a norm of the embeddings. Peng et al. 2023 (2305.13048).

A layer of theirs is two blocks of ours.
"""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.gpt_neox import layer_norm
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import Their, checked, each, expressible, setting
from llmjax.nn.block import Block
from llmjax.nn.channel_mixing import ChannelMixing
from llmjax.nn.decoder import Decoder
from llmjax.nn.norms import LayerNorm
from llmjax.nn.rwkv4 import RWKV4

SIZES: dict[str, tuple[int, int]] = {
    "169M": (12, 768),
    "430M": (24, 1024),
    "1.5B": (24, 2048),
    "3B": (32, 2560),
    "7B": (32, 4096),
    "14B": (40, 5120),
}
"""layers of theirs, d_model (the paper, table 2)"""
TIME, CHANNEL = ("key", "value", "receptance"), ("key", "receptance")
"""what reads a mixture of a token and the one before it"""


def rwkv(size: Literal["169M", "430M", "1.5B", "3B", "7B", "14B"] = "169M", vocab: int = 50277) -> Decoder:
    """The config of an RWKV-4 model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown RWKV-4 size {size!r}: use {', '.join(SIZES)}")
    layers, d_model = SIZES[size]
    return from_hf_config({"vocab_size": vocab, "hidden_size": d_model, "num_hidden_layers": layers})


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of an `rwkv` config.json; raises InputError for ill-typed values.

    `rescale_every` is not needed: it halves states and weights against overflow in float16, which the next norm undoes.
    """
    d_model, norm = setting(theirs, "hidden_size", 4096), LayerNorm(eps=setting(theirs, "layer_norm_epsilon", 1e-5))
    time = RWKV4(d_inner=setting(theirs, "attention_hidden_size", d_model))
    channel = ChannelMixing(d_ff=setting(theirs, "intermediate_size", 4 * d_model))
    config = Decoder(
        vocab=setting(theirs, "vocab_size", 50277),
        d_model=d_model,
        layers=2 * setting(theirs, "num_hidden_layers", 32),
        pattern=(Block(time, None, norm), Block(channel, None, norm)),
        norm=LayerNorm(),
        embedding_norm=norm,
        tied=setting(theirs, "tie_word_embeddings", False),
    )
    return checked(config)


def to_hf_config(config: Decoder) -> Their:
    """The `rwkv` config.json of our config; raises InputError where RWKV-4 cannot say what it holds."""
    (block, time, _), (_, channel, _) = each(config, "rwkv", type(None), RWKV4, ChannelMixing)
    theirs = {
        "model_type": FAMILY.model_type,
        "architectures": [FAMILY.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers // 2,
        "attention_hidden_size": time.d_inner,
        "intermediate_size": channel.d_ff,
        "layer_norm_epsilon": getattr(block.norm, "eps", 1e-5),
        "rescale_every": 0,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return expressible(config, theirs, "rwkv", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """The norm of the embeddings stands in the first layer."""
    time = [
        *(Entry((f"{name}/kernel",), f"{name}.weight", "o i -> i o") for name in TIME),
        *(Entry((f"{name}_mix",), f"time_mix_{name}", "1 1 d -> d") for name in TIME),
        Entry(("out/kernel",), "output.weight", "o i -> i o"),
        Entry(("decay",), "time_decay", "i -> i"),
        Entry(("bonus",), "time_first", "i -> i"),
    ]
    channel = [
        *(Entry((f"{name}/kernel",), f"{name}.weight", "o i -> i o") for name in TIME),
        *(Entry((f"{name}_mix",), f"time_mix_{name}", "1 1 d -> d") for name in CHANNEL),
    ]
    layer = "rwkv.blocks.{r}."
    return (
        Entry(("embed/embedding",), "rwkv.embeddings.weight", "v d -> v d"),
        *layer_norm("embedding_norm", "rwkv.blocks.0.pre_ln"),
        *layer_norm("blocks/0/mixer_norm", f"{layer}ln1"),
        *(entry.at("blocks/0/mixer/", f"{layer}attention.") for entry in time),
        *layer_norm("blocks/1/mixer_norm", f"{layer}ln2"),
        *(entry.at("blocks/1/mixer/", f"{layer}feed_forward.") for entry in channel),
        *layer_norm("norm", "rwkv.ln_out"),
        *(() if config.tied else (Entry(("head/kernel",), "head.weight", "v d -> d v"),)),
    )


FAMILY = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    prefix="rwkv.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies={"head.weight": "rwkv.embeddings.weight"},
    extra=("bos_token_id", "eos_token_id", "pad_token_id", "context_length"),
)
