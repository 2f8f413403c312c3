"""Methods of low rank in peft's names: LoRA and its variants, AdaLoRA."""

from collections.abc import Mapping
from typing import Any

from llmjax.adapters.adalora import AdaLoRA
from llmjax.adapters.dora import DoRA
from llmjax.adapters.lora import LoRA
from llmjax.adapters.olora import OLoRA
from llmjax.adapters.peft.modules import Part
from llmjax.adapters.pissa import PiSSA
from llmjax.config import InputError
from llmjax.nn.projections import Projection

STARTS: dict[Any, type[LoRA]] = {"pissa": PiSSA, "olora": OLoRA}
"""Starts that change the base, by `init_lora_weights`: peft makes them again from the base wherever it loads one."""
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")
"""Starts that leave the base as it is."""
EPSILON = 1e-5
"""peft divides AdaLoRA's change by rank + 1e-5."""


def lora_parts(adapter: LoRA, projection: Projection) -> tuple[Part, ...]:
    """A and B."""
    looked_up = projection.leaf == "embedding"
    names = ("lora_embedding_A", "lora_embedding_B") if looked_up else ("lora_A.weight", "lora_B.weight")
    return Part("a", names[0], "r I -> I r"), Part("b", names[1], "O r -> r O")


def lora_config(adapter: LoRA) -> dict[str, Any]:
    """The keys of LoRA."""
    start = next((start for start, method in STARTS.items() if type(adapter) is method), True)
    return {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.stabilised,
        "use_dora": isinstance(adapter, DoRA),
        "init_lora_weights": start,
        "bias": "none",
    }


def lora_of(theirs: Mapping[str, Any]) -> LoRA:
    """Our LoRA, DoRA, PiSSA or OLoRA; InputError for another start that changes the base, and for two in one."""
    start = theirs.get("init_lora_weights", True)
    if start not in PLAIN and start not in STARTS:
        raise InputError(f"init_lora_weights={start!r} is not read: it changes the base in a way that is not known")
    method = STARTS.get(start, LoRA)
    if theirs.get("use_dora"):
        if method is not LoRA:
            raise InputError(f"use_dora beside init_lora_weights={start!r} is not read")
        method = DoRA
    if start in STARTS and (theirs.get("rank_pattern") or theirs.get("alpha_pattern")):
        raise InputError(f"rank_pattern and alpha_pattern beside init_lora_weights={start!r} are not read")
    return method(
        rank=theirs.get("r", 8),
        alpha=float(theirs.get("lora_alpha", 8)),
        dropout=float(theirs.get("lora_dropout", 0.0)),
        stabilised=bool(theirs.get("use_rslora", False)),
    )


def dora_parts(adapter: DoRA, projection: Projection) -> tuple[Part, ...]:
    """A, B and the lengths of columns."""
    return *lora_parts(adapter, projection), Part("magnitude", "lora_magnitude_vector", "O -> O")


def adalora_parts(adapter: AdaLoRA, projection: Projection) -> tuple[Part, ...]:
    """P, Q and the values."""
    return (
        Part("a", "lora_A", "r I -> I r"),
        Part("b", "lora_B", "O r -> r O"),
        Part("singular", "lora_E", "r 1 -> r"),
    )


def adalora_config(adapter: AdaLoRA) -> dict[str, Any]:
    """The keys of AdaLoRA; the schedule of cuts is the optimizer's, and peft asks for one step of it at least."""
    return {
        "init_r": adapter.rank,
        "target_r": adapter.rank,
        "total_step": 1,
        "lora_alpha": adapter.scale * (adapter.rank + EPSILON),
        "lora_dropout": adapter.dropout,
        "orth_reg_weight": adapter.orthogonality,
        "bias": "none",
    }


def adalora_of(theirs: Mapping[str, Any]) -> AdaLoRA:
    """Our AdaLoRA."""
    rank = theirs.get("init_r", 12)
    return AdaLoRA(
        rank=rank,
        alpha=theirs.get("lora_alpha", 8) * rank / (rank + EPSILON),
        dropout=float(theirs.get("lora_dropout", 0.0)),
        orthogonality=float(theirs.get("orth_reg_weight", 0.5)),
    )
