"""Mamba-2: as Mamba, with heads that share a decay and one projection for everything. Dao and Gu 2024 (2405.21060)."""

from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models import mamba
from llmjax.models.mapping import Entry, Family
from llmjax.models.settings import Their, expressible, first, require, setting
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba2 import Mamba2

Size = Literal["130M", "370M", "780M", "1.3B", "2.7B", "Codestral 7B"]

SIZES: dict[str, tuple[int, int, int, int, bool]] = {
    "130M": (24, 768, 1, 50288, True),
    "370M": (48, 1024, 1, 50288, True),
    "780M": (48, 1536, 1, 50288, True),
    "1.3B": (48, 2048, 1, 50288, True),
    "2.7B": (64, 2560, 1, 50288, True),
    "Codestral 7B": (64, 4096, 8, 32768, False),
}
"""layers, d_model, groups, vocabulary (padded to a multiple of 16), whether the head is tied"""
UNLIMITED = (None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
"""ways to write that steps are not clipped"""


def mamba2(size: Size = "130M") -> Decoder:
    """The config of a Mamba-2 model or of Mamba-Codestral; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown Mamba-2 size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, groups, vocab, tied = SIZES[size]
    theirs = {"hidden_size": d_model, "num_hidden_layers": layers, "vocab_size": vocab, "tie_word_embeddings": tied}
    return from_hf_config(theirs | {"num_heads": 2 * d_model // 64, "n_groups": groups})


def from_hf_config(theirs: Mapping[str, Any]) -> Decoder:
    """Our config of a `mamba2` config.json; raises InputError for ill-typed values."""
    theirs = {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 32768, **theirs}
    head_dim, expand = setting(theirs, "head_dim", 64), setting(theirs, "expand", 2)
    d_inner = expand * setting(theirs, "hidden_size", 4096)
    require(theirs, hidden_act="silu", num_heads=d_inner // max(head_dim, 1))
    refuse_limit(theirs)
    mixer = Mamba2(
        d_state=setting(theirs, "state_size", 128),
        expand=expand,
        head_dim=head_dim,
        groups=setting(theirs, "n_groups", 8),
        taps=setting(theirs, "conv_kernel", 4),
        bias=setting(theirs, "use_bias", False),
        conv_bias=setting(theirs, "use_conv_bias", True),
        eps=setting(theirs, "layer_norm_epsilon", 1e-5),
    )
    return mamba.stack_of(theirs, mixer, tied=False)


def refuse_limit(theirs: Mapping[str, Any]) -> None:
    """Raise InputError for a config that clips its steps."""
    limit = theirs.get("time_step_limit")
    if limit not in UNLIMITED:
        raise InputError(f"config.json: time_step_limit={limit} is not supported: only [0.0, Infinity] is")


def to_hf_config(config: Decoder) -> Their:
    """The `mamba2` config.json of our config; raises InputError where Mamba-2 cannot say what it holds."""
    _, mixer, _ = first(config, "mamba2", Mamba2, type(None))
    theirs = mamba.settings_of(config, FAMILY, mixer)
    del theirs["intermediate_size"]
    theirs |= {
        "num_heads": mixer.expand * config.d_model // mixer.head_dim,
        "head_dim": mixer.head_dim,
        "n_groups": mixer.groups,
    }
    return expressible(config, theirs, "mamba2", from_hf_config)


def table(config: Decoder) -> tuple[Entry, ...]:
    """As Mamba's, all projections of the input being one tensor."""
    return mamba.whole(config, mixer_table(config.pattern[0].mixer))


def mixer_table(mixer: Any) -> list[Entry]:
    """Tensors of a mixer."""
    return [
        *mamba.projection(("gate", "up", "select", "step"), "in_proj", mixer.bias),
        *mamba.projection(("out",), "out_proj", mixer.bias),
        *mamba.convolution("conv1d", mixer.conv_bias),
        *(Entry((name,), name, "h -> h") for name in ("dt_bias", "A_log", "D")),
        Entry(("norm",), "norm.weight", "i -> i"),
    ]


FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    prefix="backbone.",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    table=table,
    copies=mamba.TIED,
    extra=mamba.SPECIAL,
)
