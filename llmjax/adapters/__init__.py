"""Adapters: small sets of parameters added from outside to a model that stays as it is."""

from llmjax.adapters.adalora import AdaLoRA
from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import Adapter, ProjectionAdapter
from llmjax.adapters.boft import BOFT
from llmjax.adapters.bottleneck import Bottleneck
from llmjax.adapters.compacter import Compacter
from llmjax.adapters.dora import DoRA
from llmjax.adapters.dylora import DyLoRA
from llmjax.adapters.fold import folded
from llmjax.adapters.gated import GatedLoRA
from llmjax.adapters.ia3 import IA3
from llmjax.adapters.intrinsic import IntrinsicDimension
from llmjax.adapters.loha import LoHa
from llmjax.adapters.lokr import LoKr
from llmjax.adapters.lora import LoRA
from llmjax.adapters.mam import mam
from llmjax.adapters.merge import merge, unmerge
from llmjax.adapters.mixture import Mixture
from llmjax.adapters.oft import OFT
from llmjax.adapters.olora import OLoRA
from llmjax.adapters.p_tuning import PTuning
from llmjax.adapters.pissa import PiSSA
from llmjax.adapters.prefix import PrefixTuning
from llmjax.adapters.prompt import PromptTuning
from llmjax.adapters.unipelt import unipelt
from llmjax.adapters.vera import VeRA

__all__ = [
    "BOFT",
    "IA3",
    "OFT",
    "AdaLoRA",
    "Adapted",
    "Adapter",
    "Bottleneck",
    "Compacter",
    "DoRA",
    "DyLoRA",
    "GatedLoRA",
    "IntrinsicDimension",
    "LoHa",
    "LoKr",
    "LoRA",
    "Mixture",
    "OLoRA",
    "PTuning",
    "PiSSA",
    "PrefixTuning",
    "ProjectionAdapter",
    "PromptTuning",
    "VeRA",
    "folded",
    "mam",
    "merge",
    "unipelt",
    "unmerge",
]
