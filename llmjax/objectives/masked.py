"""Masked language modelling: some tokens are hidden or replaced, and predicted from all others."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llmjax.config import InputError
from llmjax.nn.metric import Metric
from llmjax.nn.model import Params
from llmjax.objectives.base import Apply, Batch, Objective
from llmjax.objectives.head import head_loss


@dataclass(frozen=True)
class Masked(Objective):
    """Mean of -log p(token | corrupted row) over chosen tokens. Devlin et al. 2018 (1810.04805), section 3.1.

    Each token is chosen with probability `rate`, by a coin of its own; of the chosen ones 80 % become the mask, 10 % a
    random token, and 10 % stay. The choice is drawn from the step's key; in evaluation it is a function of the batch.
    """

    mask_id: int = 257
    """id of the mask, below the model's vocabulary (257: the first that `Bytes` leaves free; BERT: 103)"""
    vocab: int = 257
    """random tokens are drawn below this id: the tokenizer's vocabulary"""
    rate: float = 0.15
    """probability that a token is to be predicted"""
    hidden: float = 0.8
    """part of these that the mask replaces"""
    random: float = 0.1
    """part of these that a random token replaces; the rest stays as it is"""
    chunk: int | None = 1024
    """tokens whose float32 logits exist on a device at a time; None keeps all"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.chunk is not None and self.chunk < 1:
            yield "chunk", "must be at least 1 token, or None for all at once"
        if not 0 < self.rate <= 1:
            yield "rate", "must be above 0 and at most 1"
        if min(self.hidden, self.random) < 0 or self.hidden + self.random > 1:
            yield "hidden", f"and random={self.random} are parts of a whole: at least 0, together at most 1"
        for name in ("mask_id", "vocab"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"

    def loss(
        self, apply: Apply, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """The mean over the chosen tokens, and the metrics of `head_loss`: nll, accuracy and others of these tokens.

        Raises InputError where the model has no row for the mask.
        """
        tokens = batch["tokens"]
        draws = jax.random.fold_in(jax.random.key(0) if key is None else key, jnp.sum(tokens))
        corrupted, chosen = self.corrupt(draws, tokens, batch["positions"] >= 0)
        where = {name: batch[name] for name in ("positions", "segment_ids")}
        features = apply(params, corrupted, **where, key=key, method="features")
        if features.kernel.shape[1] <= self.mask_id:
            vocab = features.kernel.shape[1]
            raise InputError(f"objective.mask_id={self.mask_id} is beyond the {vocab} ids of the model")
        return head_loss(features, tokens, chosen, self.chunk)

    def corrupt(
        self, key: PRNGKeyArray, tokens: Int[Array, "batch length"], present: Bool[Array, "batch length"]
    ) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
        """The corrupted tokens, and which of them are to be predicted; padding is neither."""
        choice, fate, other = jax.random.split(key, 3)
        chosen = present & jax.random.bernoulli(choice, self.rate, tokens.shape)
        coin = jax.random.uniform(fate, tokens.shape)
        strange = jax.random.randint(other, tokens.shape, 0, self.vocab, tokens.dtype)
        new = jnp.where(coin < self.hidden, self.mask_id, jnp.where(coin < self.hidden + self.random, strange, tokens))
        return jnp.where(chosen, new, tokens), chosen
