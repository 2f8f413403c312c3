"""Adapters: small sets of parameters added from outside to a model that stays as it is."""

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import Adapter, ProjectionAdapter
from llmjax.adapters.lora import LoRA

__all__ = ["Adapted", "Adapter", "LoRA", "ProjectionAdapter"]
