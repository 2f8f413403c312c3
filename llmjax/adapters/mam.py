"""MAM: a short prefix in attention and a wide parallel adapter in feed-forward layers. He et al. 2022 (2110.04366)."""

from llmjax.adapters.base import Adapter
from llmjax.adapters.bottleneck import Bottleneck
from llmjax.adapters.prefix import PrefixTuning


def mam(count: int = 30, hidden: int | None = None, size: int = 512, scale: float = 4.0) -> tuple[Adapter, ...]:
    """The mix-and-match adapter, its sizes those of the paper."""
    return (
        PrefixTuning("prefix", count=count, hidden=hidden),
        Bottleneck("adapter", size=size, places=("mlp",), parallel=True, scale=scale),
    )
