"""Next-token prediction: token-mean negative log-likelihood, with an optional z-loss."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.metric import Metric
from llmjax.nn.model import Params
from llmjax.objectives.base import Apply, Batch, Objective
from llmjax.objectives.head import head_loss


@dataclass(frozen=True)
class NextToken(Objective):
    """sum_i mask_i (-log p(target_i | past) + z lse_i^2) / sum_i mask_i. Radford et al. 2019; z-loss: 2204.02311."""

    chunk: int | None = 1024
    """tokens whose float32 logits exist on a device at a time; None keeps all"""
    z_loss: float = 0.0
    """weight of the squared log-normaliser (PaLM: 1e-4)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.chunk is not None and self.chunk < 1:
            yield "chunk", "must be at least 1 token, or None for all at once"
        if self.z_loss < 0:
            yield "z_loss", "must not be negative"

    def loss(
        self, apply: Apply, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """Mean loss over the tokens that `loss_mask` weights.

        Metrics: those of `head_loss`, and bits_per_byte (nll over UTF-8 bytes of the targets).
        """
        features = apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            key=key,
            method="features",
        )
        value, metrics = head_loss(features, batch["targets"], batch["loss_mask"], self.chunk, self.z_loss)
        text_bytes = jnp.sum(batch["loss_mask"] * batch["target_bytes"])
        return value, metrics | {"bits_per_byte": Metric(metrics["nll"].total / math.log(2), text_bytes)}
