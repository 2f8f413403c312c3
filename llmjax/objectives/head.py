"""The loss of a model's head at given targets, whatever the head is: what the objectives of language models share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.metric import Metric
from llmjax.nn.model import Features
from llmjax.nn.softmax_mixture import log_mixture
from llmjax.parallel.mesh import summed_over_tokens
from pallas_kernels.cross_entropy import TokenLosses, linear_cross_entropy


def head_loss(
    features: Features,
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    chunk: int | None = 1024,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    """sum_i weights_i (nll_i + z_loss lse_i^2) / sum_i weights_i, and the losses that layers hand out.

    Metrics: loss; nll (nats a token); accuracy; z_loss; and what the model's layers hand out, whose losses count here
    once for each token. On a device, logits of at most `chunk` tokens exist at a time (None: of all). Raises ValueError
    for a z-loss of a mixture of softmaxes.
    """
    weights = weights.astype(jnp.float32)

    def part(head: Any, hidden: Array, targets: Array, weights: Array) -> tuple[Float[Array, ""], TokenLosses]:
        own = Features(hidden, head[0], features.soft_cap, head[1])
        total, tokens = weighted(own, targets.reshape(-1), weights.reshape(-1), chunk, z_loss)
        return total, TokenLosses(*(x.reshape(targets.shape) for x in tokens))

    total, tokens = summed_over_tokens(part, (features.kernel, features.mixture), features.hidden, targets, weights)
    count = jnp.sum(weights)
    for loss in features.losses.values():
        total = total + count * loss
    metrics = {
        "loss": Metric(total, count),
        "nll": Metric(jnp.sum(weights * tokens.nll), count),
        "accuracy": Metric(jnp.sum(weights * tokens.correct), count),
        "z_loss": Metric(z_loss * jnp.sum(weights * jnp.square(tokens.lse)), count),
    }
    handed_out = features.losses | features.metrics
    metrics |= {name: Metric(count * value, count) for name, value in handed_out.items()}
    return total / jnp.maximum(count, 1.0), metrics


def weighted(
    features: Features,
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    chunk: int | None,
    z_loss: float,
) -> tuple[Float[Array, ""], TokenLosses]:
    """The weighted sum over tokens, and each token's terms."""
    hidden = features.hidden.reshape(-1, features.hidden.shape[-1])
    if features.mixture is None:
        cap = features.soft_cap
        return linear_cross_entropy(hidden, features.kernel, targets, weights, chunk=chunk, z_loss=z_loss, soft_cap=cap)
    if z_loss:
        raise ValueError(f"z_loss={z_loss} has no effect on a mixture of softmaxes, whose normaliser is 1: use 0")
    one = jax.checkpoint(partial(of_mixture, features))
    nll, correct = jax.lax.map(one, (hidden, targets), batch_size=chunk or len(targets))
    return jnp.sum(weights * nll), TokenLosses(nll, jnp.zeros_like(nll), correct)


def of_mixture(
    features: Features, token: tuple[Float[Array, " d_model"], Int[Array, ""]]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """-log p of one token, and whether no other is more probable."""
    hidden, target = token
    assert features.mixture is not None
    logs = log_mixture(hidden, features.kernel, features.mixture, features.soft_cap)
    return -logs[target], logs[target] >= jnp.max(logs)
