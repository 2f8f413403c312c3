"""Next-token prediction with further tokens: the losses of a chain of blocks that each predict one token more."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from llmjax.config import InputError
from llmjax.nn.metric import Metric
from llmjax.nn.model import Params
from llmjax.objectives.base import Apply, Batch
from llmjax.objectives.head import head_loss
from llmjax.objectives.next_token import NextToken


@dataclass(frozen=True)
class NextTokens(NextToken):
    """L + weight / depth sum_k L_k, L the next-token loss and L_k that of t_i+k+1 given h_k,i (`Decoder.multi_token`).

    DeepSeek-V3 (2412.19437), equations 24 and 25, but for one thing: L_k is the mean over the tokens that are there,
    where the paper divides by the row's length.
    """

    weight: float = 0.3
    """weight of the further tokens (DeepSeek-V3: 0.3, in the last third of training 0.1)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.weight < 0:
            yield "weight", "must not be negative"

    def loss(
        self, apply: Apply, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """NextToken's loss and metrics, and nll_k and accuracy_k of the k-th token from here on (k = 2 and up).

        Raises InputError where the model predicts no further tokens.
        """
        where = {name: batch[name] for name in ("positions", "segment_ids")}
        features = apply(params, batch["tokens"], **where, key=key, method="features")
        if features.ahead is None:
            raise InputError("objective=NextTokens predicts with model.multi_token, and this model has none")
        value, metrics = super().loss(lambda *_, **__: features, params, batch, key)
        for k, hidden in enumerate(features.ahead, start=1):
            weights = batch["loss_mask"] * same_document(batch["segment_ids"], k) * shifted(batch["loss_mask"], k)
            chain = replace(features, hidden=hidden, losses={}, metrics={})
            more, found = head_loss(chain, shifted(batch["targets"], k), weights, self.chunk, self.z_loss)
            value = value + self.weight / len(features.ahead) * more
            metrics |= {f"{name}_{k + 1}": found[name] for name in ("nll", "accuracy")}
        count = metrics["loss"].count
        return value, metrics | {"loss": Metric(value * count, count)}


def shifted(x: Array, k: int) -> Array:
    """Entry i + k at place i; zeros at the end."""
    return jnp.pad(x[:, k:], ((0, 0), (0, min(k, x.shape[1]))))


def same_document(segment_ids: Array, k: int) -> Bool[Array, "batch length"]:
    """Whether the token k places on is of the same document."""
    return segment_ids == shifted(segment_ids, k)
