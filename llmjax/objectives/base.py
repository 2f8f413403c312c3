"""What every objective offers to the trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Array, Float, Int, PRNGKeyArray

from llmjax.nn.metric import Metric
from llmjax.nn.model import Params

Batch = Mapping[str, Array]
"""Arrays `[batch, length]`: tokens, targets, loss_mask, positions, segment_ids, target_bytes."""


class Apply(Protocol):
    """The model as a function; a `key` turns on dropout, `method` picks "__call__" (logits) or "features"."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "batch length"],
        *,
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        key: PRNGKeyArray | None = None,
        method: str = "__call__",
    ) -> Any:
        """Logits `[batch, length, vocab]`, or Features, which alone hold the losses of the model's own layers."""
        ...


@dataclass(frozen=True)
class Objective:
    """Base of the objectives."""

    def loss(
        self, apply: Apply, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """The float32 scalar to minimise, and metrics; `metrics["loss"].count` is the weight of this batch."""
        raise NotImplementedError
