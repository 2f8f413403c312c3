"""Classification of images: cross-entropy of the class that the batch gives each image."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.metric import Metric
from llmjax.nn.model import Params
from llmjax.objectives.base import Apply, Batch, Objective


@dataclass(frozen=True)
class Classification(Objective):
    """mean_i -log softmax(logits_i)[label_i]. Reads `images` `[batch, side, side, channels]`, `labels` `[batch, 1]`."""

    def loss(
        self, apply: Apply, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """Mean loss of the images, and the losses of the model's own layers.

        Metrics: loss; accuracy; and what layers hand out. An image weighs as many tokens as its row has, so that rates
        and FLOPs are a token's.
        """
        features = apply(params, images=batch["images"], key=key, method="features")
        labels = batch["labels"][:, 0]
        nll = optax.softmax_cross_entropy_with_integer_labels(features.logits, labels)
        correct = jnp.argmax(features.logits, axis=-1) == labels
        return mean_loss(jnp.mean(nll), {"accuracy": jnp.mean(correct)}, features, batch)


def mean_loss(
    loss: Float[Array, ""], means: dict[str, Float[Array, ""]], features: Any, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    """The loss with the layers' own, and it and all `means` as metrics that count for each token of the batch."""
    total = loss + sum(features.losses.values())
    count = jnp.float32(batch["tokens"].size)
    means = {"loss": total} | means | features.losses | features.metrics
    return total, {name: Metric(count * value, count) for name, value in means.items()}
