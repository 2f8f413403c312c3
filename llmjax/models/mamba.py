"""Mamba: a stack of selective state-space blocks without feed-forward layers, its head tied. Gu and Dao 2023."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import Their, checked, expressible, first, require, setting
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mamba import Mamba
from llmjax.nn.mixer import Mixer
from llmjax.nn.norms import RMSNorm

Size = Literal["130M", "370M", "790M", "1.4B", "2.8B"]

SIZES: dict[str, tuple[int, int]] = {
    "130M": (24, 768),
    "370M": (48, 1024),
    "790M": (48, 1536),
    "1.4B": (48, 2048),
    "2.8B": (64, 2560),
}
"""layers, d_model (2312.00752, table 12)"""


def mamba(size: Size = "130M", vocab: int = 50280) -> Decoder:
    """The config of a Mamba model; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Mamba size {size!r}: use {', '.join(SIZES)}")
    layers, d_model = SIZES[size]
    return from_hf_config({"vocab_size": vocab, "hidden_size": d_model, "num_hidden_layers": layers})


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `mamba` config.json; raises InputError for ill-typed values."""
    d_model, expand = setting(theirs, "hidden_size", 768), setting(theirs, "expand", 2)
    require(theirs, hidden_act="silu", intermediate_size=expand * d_model)
    automatic = theirs.get("time_step_rank") == "auto"
    mixer = Mamba(
        d_state=setting(theirs, "state_size", 16),
        expand=expand,
        taps=setting(theirs, "conv_kernel", 4),
        dt_rank=None if automatic else setting(theirs, "time_step_rank", -(-d_model // 16)),
        bias=setting(theirs, "use_bias", False),
        conv_bias=setting(theirs, "use_conv_bias", True),
    )
    return stack_of(theirs, mixer, tied=True)


def stack_of(theirs: Mapping[str, Any], mixer: Mixer, tied: bool) -> Decoder:
    """Our model of such mixers, checked; `tied` where the file does not say."""
    norm = RMSNorm(eps=setting(theirs, "layer_norm_epsilon", 1e-5))
    config = Decoder(
        vocab=setting(theirs, "vocab_size", 50280),
        d_model=setting(theirs, "hidden_size", 768),
        layers=setting(theirs, "num_hidden_layers", 32),
        pattern=(Block(mixer=mixer, mlp=None, norm=norm),),
        norm=norm,
        tied=setting(theirs, "tie_word_embeddings", tied),
        initializer=GPT2Init(std=setting(theirs, "initializer_range", 0.1)),
    )
    return checked(config)


def to_hf_config(config: Decoder) -> Their:
    """The `mamba` config.json of our config; raises InputError where Mamba cannot say what it holds."""
    _, mixer, _ = first(config, "mamba", Mamba, type(None))
    theirs = settings_of(config, FAMILY, mixer) | {"time_step_rank": mixer.dt_rank}
    return expressible(config, theirs, "mamba", from_hf_config)


def settings_of(config: Decoder, family: Family, mixer: Any) -> Their:
    """The keys that both versions of Mamba have."""
    return {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": mixer.expand * config.d_model,
        "num_hidden_layers": config.layers,
        "state_size": mixer.d_state,
        "expand": mixer.expand,
        "conv_kernel": mixer.taps,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": getattr(config.pattern[0].norm, "eps", 1e-5),
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def table(config: Decoder) -> tuple[Entry, ...]:
    """What goes through the convolution and its gate are one tensor; steps have a bias of their own."""
    mixer: Any = config.pattern[0].mixer
    return whole(
        config,
        [
            *projection(("up", "gate"), "in_proj", mixer.bias),
            *projection(("out",), "out_proj", mixer.bias),
            *convolution("conv1d", mixer.conv_bias),
            Entry(("select/kernel",), "x_proj.weight", "o i -> i o"),
            Entry(("step/kernel",), "dt_proj.weight", "o i -> i o"),
            Entry(("dt_bias",), "dt_proj.bias", "i -> i"),
            Entry(("A_log",), "A_log", "i s -> i s"),
            Entry(("D",), "D", "i -> i"),
        ],
    )


def projection(ours: tuple[str, ...], theirs: str, bias: bool) -> list[Entry]:
    """Projections that are one tensor, one after another."""
    found = [Entry(tuple(f"{name}/kernel" for name in ours), f"{theirs}.weight", "[o] i -> i o")]
    return [*found, Entry(tuple(f"{name}/bias" for name in ours), f"{theirs}.bias", "[o] -> o")] if bias else found


def convolution(theirs: str, bias: bool) -> list[Entry]:
    """A short convolution, channel by channel."""
    found = [Entry(("conv/kernel",), f"{theirs}.weight", "c 1 w -> w c")]
    return [*found, Entry(("conv/bias",), f"{theirs}.bias", "c -> c")] if bias else found


def whole(config: Decoder, mixer: list[Entry]) -> tuple[Entry, ...]:
    """The tensors of a model, from those of a mixer."""
    return (
        Entry(("embed/embedding",), "backbone.embeddings.weight", "v d -> v d"),
        Entry(("blocks/*/mixer_norm/scale",), "backbone.layers.{i}.norm.weight", "d -> d"),
        *(entry.at("blocks/*/mixer/", "backbone.layers.{i}.mixer.") for entry in mixer),
        Entry(("norm/scale",), "backbone.norm_f.weight", "d -> d"),
        *(() if config.tied else (Entry(("head/kernel",), "lm_head.weight", "v d -> d v"),)),
    )


TIED = {"lm_head.weight": "backbone.embeddings.weight"}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    prefix="backbone.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=TIED,
    extra=SPECIAL,
    renamed={r"^backbone\.embedding\.": "backbone.embeddings."},
)
