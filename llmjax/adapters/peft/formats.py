"""The methods that peft has too: what it calls their fields and parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmjax.adapters.adalora import AdaLoRA
from llmjax.adapters.base import Adapter, ProjectionAdapter
from llmjax.adapters.boft import BOFT
from llmjax.adapters.dora import DoRA
from llmjax.adapters.ia3 import IA3
from llmjax.adapters.loha import LoHa
from llmjax.adapters.lokr import LoKr
from llmjax.adapters.lora import LoRA
from llmjax.adapters.oft import OFT
from llmjax.adapters.olora import OLoRA
from llmjax.adapters.peft import low_rank, other
from llmjax.adapters.peft.modules import Module, Part
from llmjax.adapters.pissa import PiSSA
from llmjax.adapters.vera import VeRA
from llmjax.config import InputError
from llmjax.nn.projections import Projection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NORMS = "LN_TUNING"
"""`peft_type` of a base that trains modules of its own, without an adapter"""
TUNED = "ln_tuning_layers"
"""what stands between the names of such a module and of its parameters"""


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
    """the method of those keys (all formats of one kind have the same); InputError for what it has not"""
    shared: tuple[Part, ...] = ()
    """its parameters for the whole model"""
    refused: tuple[str, ...] = ()
    """keys that say what our method has not, unless they are empty, false or zero"""
    bias: str | None = None
    """what the key `bias` says where biases of adapted modules train too; None where there is no such key"""
    joins: bool = False
    """whether parts of a fused module that differ are one adapter of higher rank"""
    single: bool = False
    """whether a module must be one projection, its features in our order"""
    tables: bool = False
    """whether tables that are looked up can be changed"""
    idle: bool = True
    """whether parameters that are zero change nothing"""

    def check(self, module: Module) -> None:
        """Raise InputError for a module that the method changes in another way than ours."""
        if self.tables < (module.projections[0].leaf == "embedding"):
            raise InputError(f"{self.kind} of the table {module.name} is not what peft has: use other targets")
        if self.single and not (len(module.projections) == 1 and module.ordered):
            raise InputError(
                f"{module.name} holds {', '.join(module.paths)}, side by side or in another order: of such a module "
                f"{self.method.__name__} is another function"
            )


def format_of(adapter: Adapter) -> Format:
    """How peft writes a method; raises InputError where it has not."""
    found = next((form for form in FORMATS if form.method is type(adapter)), None)
    if found is None:
        known = ", ".join(form.method.__name__ for form in FORMATS)
        raise InputError(f"{type(adapter).__name__} cannot be written for peft: {known} can; or merge it into the base")
    return found


def read_config(theirs: Mapping[str, Any]) -> tuple[Format, Any]:
    """The format and the method that adapter_config.json says; raises InputError for what is not read."""
    kind = next(form for form in FORMATS if form.kind == theirs["peft_type"])
    for key in kind.refused:
        if theirs.get(key):
            raise InputError(f"{CONFIG}: {key} is not read")
    method = kind.read(theirs)
    return format_of(method), method


LORA: dict[str, Any] = {
    "kind": "LORA",
    "write": low_rank.lora_config,
    "read": low_rank.lora_of,
    "bias": "lora_only",
    "refused": (
        "use_qalora",
        "lora_bias",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "arrow_config",
        "use_bdlora",
        "kasa_config",
        "monteclora_config",
        "velora_config",
    ),
}
DROPPED = ("rank_dropout", "module_dropout", "rank_pattern", "alpha_pattern")
FORMATS: tuple[Format, ...] = (
    Format(method=LoRA, parts=low_rank.lora_parts, joins=True, tables=True, **LORA),
    Format(method=DoRA, parts=low_rank.dora_parts, joins=True, tables=True, idle=False, **LORA),
    Format(method=PiSSA, parts=low_rank.lora_parts, single=True, idle=False, **LORA),
    Format(method=OLoRA, parts=low_rank.lora_parts, single=True, idle=False, **LORA),
    Format(
        "ADALORA",
        AdaLoRA,
        low_rank.adalora_parts,
        low_rank.adalora_config,
        low_rank.adalora_of,
        refused=LORA["refused"],
        bias="lora_only",
    ),
    Format(
        "VERA",
        VeRA,
        other.vera_parts,
        other.vera_config,
        other.vera_of,
        shared=other.VERA_SHARED,
        bias="vera_only",
        single=True,
    ),
    Format("IA3", IA3, other.ia3_parts, other.ia3_config, other.ia3_of, idle=False),
    Format("LOHA", LoHa, other.loha_parts, other.loha_config, other.loha_of, refused=DROPPED),
    Format("LOKR", LoKr, other.lokr_parts, other.lokr_config, other.lokr_of, refused=DROPPED, single=True),
    Format(
        "OFT",
        OFT,
        other.oft_parts,
        other.oft_config,
        other.oft_of,
        refused=("coft", "block_share", "module_dropout"),
        bias="oft_only",
    ),
    Format(
        "BOFT",
        BOFT,
        other.boft_parts,
        other.boft_config,
        other.boft_of,
        refused=("boft_dropout",),
        bias="boft_only",
        idle=False,
    ),
)
