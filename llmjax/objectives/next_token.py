"""Next-token prediction: token-mean negative log-likelihood, with an optional z-loss."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.metric import Metric
from llmjax.nn.model import Params
from llmjax.objectives.base import Apply, Batch, Objective
from pallas_kernels.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class NextToken(Objective):
    """sum_i mask_i (-log p(target_i | past) + z lse_i^2) / sum_i mask_i. Radford et al. 2019; z-loss: 2204.02311."""

    chunk: int | None = 1024
    """tokens whose float32 logits exist at a time; None keeps all"""
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

        Metrics: loss; nll (nats a token); accuracy; bits_per_byte (nll over UTF-8 bytes of the targets); z_loss; and
        what the model's layers hand out, whose losses count here once for each token.
        """
        features = apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            key=key,
            method="features",
        )
        weights = batch["loss_mask"].reshape(-1).astype(jnp.float32)
        hidden = features.hidden.reshape(-1, features.hidden.shape[-1])
        targets = batch["targets"].reshape(-1)
        total, tokens = linear_cross_entropy(
            hidden, features.kernel, targets, weights, chunk=self.chunk, z_loss=self.z_loss, soft_cap=features.soft_cap
        )
        count = jnp.sum(weights)
        nll = jnp.sum(weights * tokens.nll)
        for loss in features.losses.values():
            total = total + count * loss
        text_bytes = jnp.sum(weights * batch["target_bytes"].reshape(-1))
        metrics = {
            "loss": Metric(total, count),
            "nll": Metric(nll, count),
            "accuracy": Metric(jnp.sum(weights * tokens.correct), count),
            "bits_per_byte": Metric(nll / math.log(2), text_bytes),
            "z_loss": Metric(self.z_loss * jnp.sum(weights * jnp.square(tokens.lse)), count),
        }
        handed_out = features.losses | features.metrics
        metrics |= {name: Metric(count * value, count) for name, value in handed_out.items()}
        return total / jnp.maximum(count, 1.0), metrics
