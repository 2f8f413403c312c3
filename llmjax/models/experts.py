"""What families with mixtures of experts share: the layers that have one, their tensors and their settings."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmjax.config import InputError
from llmjax.models import llama
from llmjax.models.mapping import Entry
from llmjax.models.settings import canonical, period
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import FeedForward
from llmjax.nn.moe import MoE
from llmjax.nn.router import TopK
from llmjax.nn.stack import Stack

NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""projections of an expert: our name, their name"""


def layered(layers: int, block: Block, mlp: Callable[[int], FeedForward]) -> tuple[Block, ...]:
    """The pattern of `layers` blocks that differ in their feed-forward layer alone."""
    return period([replace(block, mlp=mlp(i)) for i in range(layers)])


def mixture_of(config: Any, family: str) -> tuple[MoE, Any]:
    """The first mixture of experts of a canonical config, and its router; InputError where it has none of top-k."""
    found = [b.mlp for b in canonical(config).pattern if isinstance(b.mlp, MoE)] if isinstance(config, Stack) else []
    if not found or not isinstance(found[0].router, TopK):
        raise InputError(f"{type(config).__name__} cannot be said in a {family} config.json: it has MoE(router=TopK())")
    return found[0], found[0].router


def balance_of(config: Decoder) -> float:
    """Weight of the loss that balances the first mixture."""
    return next(block.mlp.balance_loss for block in config.pattern if isinstance(block.mlp, MoE))


def sparse_layers(config: Decoder) -> list[bool]:
    """Whether each layer has a mixture of experts."""
    return [isinstance(block.mlp, MoE) for block in config.pattern] * config.repeats


def dense_width(config: Decoder, usual: int) -> int:
    """Hidden width of the layers without experts; `usual` where there are none."""
    found = [block.mlp for block in canonical(config).pattern if not isinstance(block.mlp, MoE)]
    return getattr(found[0], "d_ff", usual) if found else usual


def dense(config: Decoder) -> Decoder:
    """The config with one expert in each mixture's place: what the settings of a dense model are read from."""
    if not isinstance(config, Decoder):
        return config
    blocks = (replace(b, mlp=b.mlp.expert) if isinstance(b.mlp, MoE) else b for b in config.pattern)
    return replace(config, pattern=tuple(blocks))


def table(config: Decoder, block: list[Entry], names: Mapping[str, str] = NAMES, at: str = "mlp.") -> tuple[Entry, ...]:
    """The tensors of a model, from those that all its blocks have; `at` is where a mixture stands."""
    layers = "model.layers.{i}."
    mlps = [
        entry.at(f"blocks/{i}/mlp/", layers + (at if isinstance(b.mlp, MoE) else "mlp."))
        for i, b in enumerate(config.pattern)
        for entry in (mixture_table(b.mlp, names) if isinstance(b.mlp, MoE) else glu_table())
    ]
    return (*llama.whole(config, block), *mlps)


def mixture_table(config: MoE, names: Mapping[str, str]) -> list[Entry]:
    """Router, routed experts (a tensor each) and shared ones."""
    found = [Entry(("router/kernel",), "gate.weight", "e d -> d e")]
    if config.bias_rate is not None:
        found.append(Entry(("router/bias",), "gate.e_score_correction_bias", "e -> e"))
    for ours, theirs in names.items():
        found.append(Entry((f"experts/{ours}/kernel",), f"experts.{{e}}.{theirs}.weight", "o i -> i o"))
    return found + ([entry.at("shared/", "shared_experts.") for entry in glu_table()] if config.shared else [])


def glu_table() -> list[Entry]:
    """Projections of a gated layer without biases."""
    return [Entry((f"{ours}/kernel",), f"{theirs}.weight", "o i -> i o") for ours, theirs in NAMES.items()]
