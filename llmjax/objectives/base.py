"""What every objective offers to the trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.metric import Metric
from llmjax.nn.model import Params

Batch = Mapping[str, Array]
"""Arrays `[batch, length]`: tokens, targets, loss_mask, positions, segment_ids, target_bytes.

Data with images has `images` `[batch, height, width, channels]` and perhaps `labels` `[batch, 1]` beside them.
"""


class Apply(Protocol):
    """The model as a function of what it reads: tokens by position, all else by name, None for what is absent.

    A `key` turns on dropout; `method` picks "__call__" (logits) or "features".
    """

    def __call__(
        self,
        params: Params,
        *inputs: Array,
        key: PRNGKeyArray | None = None,
        method: str = "__call__",
        **named: Array | None,
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
