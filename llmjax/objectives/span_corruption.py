"""Span corruption: spans of a row are replaced by sentinels, and an encoder-decoder writes what they were."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llmjax.config import InputError
from llmjax.nn.metric import Metric
from llmjax.nn.model import Params
from llmjax.objectives.base import Apply, Batch, Objective
from llmjax.objectives.head import head_loss


class Pair(NamedTuple):
    """Source and target of each row; positions are -1 where there is no token."""

    source: Int[Array, "batch source"]
    source_positions: Int[Array, "batch source"]
    target: Int[Array, "batch target"]
    target_positions: Int[Array, "batch target"]


@dataclass(frozen=True)
class SpanCorruption(Objective):
    """Mean of -log p(target | source). Raffel et al. 2019 (1910.10683), section 3.1.4, and their code for the spans.

    source = kept_0 <s0> kept_1 <s1> ..., target = <s0> span_0 <s1> span_1 ... <end>. How many tokens and spans are cut
    out is fixed by the row's length; how they are spread is drawn from the step's key (in evaluation it is a function
    of the batch). A row counts as one text, documents packed into it included.
    """

    sentinel: int = 288
    """id of the first sentinel, the k-th is `sentinel` - k: the last ids of the model's vocabulary (T5: 32099)"""
    end: int = 256
    """id that ends the target, and that the decoder begins with (256: end of text of `Bytes`)"""
    rate: float = 0.15
    """part of a row's tokens that is cut out"""
    span: float = 3.0
    """mean length of the spans, in tokens"""
    chunk: int | None = 1024
    """tokens whose float32 logits exist on a device at a time; None keeps all"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.chunk is not None and self.chunk < 1:
            yield "chunk", "must be at least 1 token, or None for all at once"
        if not 0 < self.rate < 1:
            yield "rate", "must be between 0 and 1"
        if self.span < 1:
            yield "span", "must be at least 1 token"

    def counts(self, length: int) -> tuple[int, int]:
        """Tokens cut out of a row of `length`, and spans they make; raises InputError for a row of one token."""
        if length < 2:
            raise InputError(f"rows of {length} token cannot be cut: raise data.length")
        noise = min(max(round(length * self.rate), 1), length - 1)
        return noise, min(max(round(noise / self.span), 1), noise, length - noise)

    def loss(
        self, apply: Apply, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """The mean over the targets, and the metrics of `head_loss`; raises InputError for sentinels out of range."""
        tokens = batch["tokens"]
        draws = jax.random.fold_in(jax.random.key(0) if key is None else key, jnp.sum(tokens))
        pair = self.pair(draws, tokens, batch["positions"] >= 0)
        inputs = jnp.pad(pair.target[:, :-1], ((0, 0), (1, 0)), constant_values=self.end)
        source = {"source": pair.source, "source_positions": pair.source_positions}
        where = {"positions": pair.target_positions, "segment_ids": None}
        features = apply(params, inputs, **where, key=key, method="features", **source)
        vocab, (_, spans) = features.kernel.shape[1], self.counts(tokens.shape[1])
        if not self.end + spans <= self.sentinel < vocab:
            why = f"must be below the {vocab} ids of the model, and {spans} ids above objective.end={self.end}"
            raise InputError(f"objective.sentinel={self.sentinel} {why}")
        return head_loss(features, pair.target, pair.target_positions >= 0, self.chunk)

    def pair(self, key: PRNGKeyArray, tokens: Int[Array, "batch length"], present: Bool[Array, "batch length"]) -> Pair:
        """Source and target of every row, of fixed lengths; padding is left out of both."""
        noise, spans = self.counts(tokens.shape[1])
        cut = jax.vmap(lambda k: spread(k, tokens.shape[1], noise, spans))(jax.random.split(key, len(tokens)))
        first = cut & ~jnp.pad(cut[:, :-1], ((0, 0), (1, 0)))
        marks = self.sentinel - jnp.cumsum(first, axis=1, dtype=tokens.dtype) + 1
        source = jnp.where(cut, marks, tokens)
        kept = present & (first | ~cut)
        written = jnp.stack([marks, tokens], axis=-1).reshape(len(tokens), -1)
        there = jnp.stack([present & first, present & cut], axis=-1).reshape(len(tokens), -1)
        written = jnp.pad(written, ((0, 0), (0, 1)), constant_values=self.end)
        there = jnp.concatenate([there, jnp.any(there, axis=1, keepdims=True)], axis=1)
        whole = tokens.shape[1] - noise + spans, noise + spans + 1
        return Pair(*close_up(source, kept, whole[0]), *close_up(written, there, whole[1]))


def spread(key: PRNGKeyArray, length: int, noise: int, spans: int) -> Bool[Array, " length"]:
    """Which tokens are cut out: `spans` runs of together `noise`, between as many runs that stay; a kept run is first.

    Each way of cutting a count into that many runs is as likely as the others.
    """

    def runs(key: PRNGKeyArray, total: int) -> Int[Array, " spans"]:
        ends = jax.random.permutation(key, jnp.arange(total - 1) < spans - 1)
        run = jnp.pad(jnp.cumsum(ends, dtype=jnp.int32), (1, 0))
        return jnp.zeros(spans, jnp.int32).at[run].add(1)

    kept_key, cut_key = jax.random.split(key)
    lengths = jnp.stack([runs(kept_key, length - noise), runs(cut_key, noise)], axis=1).reshape(-1)
    starts = jnp.cumsum(lengths) - lengths
    return jnp.cumsum(jnp.zeros(length, jnp.int32).at[starts].add(1)) % 2 == 0


def close_up(
    tokens: Int[Array, "batch slots"], there: Bool[Array, "batch slots"], length: int
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """The tokens that are there, moved together, and their positions: -1 behind the last."""
    order = jnp.argsort(~there, axis=1, stable=True)[:, :length]
    count = jnp.sum(there, axis=1, keepdims=True)
    where = jnp.broadcast_to(jnp.arange(length), order.shape)
    positions = jnp.where(where < count, where, -1)
    return jnp.where(positions < 0, 0, jnp.take_along_axis(tokens, order, axis=1)), positions
