"""Contrastive learning of pairs: each image is to find its text in the batch, and each text its image."""

from dataclasses import dataclass

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.metric import Metric
from llmjax.nn.model import Params
from llmjax.objectives.base import Apply, Batch, Objective
from llmjax.objectives.classification import mean_loss


@dataclass(frozen=True)
class Contrastive(Objective):
    """`contrastive_loss` of a batch's pairs. Reads `images` `[batch, side, side, channels]` and `tokens`, their texts.

    A pair's negatives are all other pairs of the microbatch, over all devices: with `train.accumulate` they are fewer.
    """

    def loss(
        self, apply: Apply, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """Mean loss of the pairs, and the losses of the model's own layers.

        Metrics: loss; image_accuracy and text_accuracy (images that find their text, texts that find their image);
        scale (the factor of the cosines); and what layers hand out. A pair weighs as many tokens as its row has.
        """
        joint = apply(params, batch["tokens"], images=batch["images"], key=key, method="features")
        logits = joint.scale * joint.images @ joint.texts.T
        pairs = jnp.arange(len(logits))
        means = {
            "image_accuracy": jnp.mean(jnp.argmax(logits, axis=1) == pairs),
            "text_accuracy": jnp.mean(jnp.argmax(logits, axis=0) == pairs),
            "scale": joint.scale,
        }
        return mean_loss(contrastive_loss(logits), means, joint, batch)


def contrastive_loss(logits: Float[Array, "pairs pairs"]) -> Float[Array, ""]:
    """(mean_i -log softmax(logits[i])[i] + mean_j -log softmax(logits[:, j])[j]) / 2. Radford et al. 2021 (2103.00020).

    Float32. It is log N where all N pairs are alike.
    """
    pairs = jnp.arange(len(logits))
    both = jnp.stack([logits, logits.T])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(both, jnp.stack([pairs, pairs])))
