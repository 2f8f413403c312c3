"""The methods that peft has too: what it calls their fields and parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmjax.adapters.base import Adapter, ProjectionAdapter
from llmjax.adapters.lora import LoRA
from llmjax.adapters.peft.modules import Part
from llmjax.config import InputError
from llmjax.nn.projections import Projection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Format:
    """How peft writes a method."""

    kind: str
    """`peft_type`"""
    method: type[ProjectionAdapter]
    """our class"""
    parts: Callable[[Any, Projection], tuple[Part, ...]]
    """its parameters for a projection"""
    write: Callable[[Any], dict[str, Any]]
    """the keys of adapter_config.json that say its fields"""
    read: Callable[[Mapping[str, Any]], Any]
    """the method of those keys; InputError for what it has not"""


def format_of(adapter: Adapter) -> Format:
    """How peft writes a method; raises InputError where it has not."""
    found = next((form for form in FORMATS if form.method is type(adapter)), None)
    if found is None:
        known = ", ".join(form.method.__name__ for form in FORMATS)
        raise InputError(f"{type(adapter).__name__} cannot be written for peft: {known} can; or merge it into the base")
    return found


def lora_parts(adapter: LoRA, projection: Projection) -> tuple[Part, ...]:
    """A and B."""
    looked_up = projection.leaf == "embedding"
    names = ("lora_embedding_A", "lora_embedding_B") if looked_up else ("lora_A.weight", "lora_B.weight")
    return Part("a", names[0], "r I -> I r"), Part("b", names[1], "O r -> r O")


def lora_config(adapter: LoRA) -> dict[str, Any]:
    """LoRA's keys."""
    return {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.stabilised,
        "bias": "none",
    }


def lora_of(theirs: Mapping[str, Any]) -> LoRA:
    """Our LoRA."""
    for key in ("use_dora", "use_qalora", "lora_bias"):
        if theirs.get(key):
            raise InputError(f"{CONFIG}: {key} is not read")
    return LoRA(
        rank=theirs.get("r", 8),
        alpha=float(theirs.get("lora_alpha", 8)),
        dropout=float(theirs.get("lora_dropout", 0.0)),
        stabilised=bool(theirs.get("use_rslora", False)),
    )


FORMATS: tuple[Format, ...] = (Format("LORA", LoRA, lora_parts, lora_config, lora_of),)
