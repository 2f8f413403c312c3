"""Which keys a query may attend to: the base of the masks, and those that every attention kernel knows.

Causality, documents, prefixes and padding are shared by all masks and added by `Scores`; a mask says what else is seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.scores import Scores, Tokens, present


@dataclass(frozen=True)
class AttentionMask:
    """Base of the masks: a description by positions in the document, never a `[length, length]` array by itself."""

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch #heads length source"]:
        """The mask written out for the given positions: what tests compare with, and what a few decoded tokens use."""
        raise NotImplementedError

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """Attention under this mask; masks that can skip work do so here, and fall back on this for cached tokens."""
        shown = self.visible(scores.queries.positions, scores.keys.positions, scores.query.shape[2])
        return scores.run(mask=shown)

    def keys_seen(self, length: int, causal: bool) -> float:
        """Keys that a query sees, averaged over a document of `length` tokens (what FLOPs are counted from)."""
        raise NotImplementedError

    def any_order(self) -> bool:
        """Whether tokens may stand in any order, so long as their positions are right."""
        return False

    def causal_only(self) -> bool:
        """Whether it is made of past tokens, and means nothing where later ones are seen."""
        return False

    def takes_distance(self) -> bool:
        """Whether a `DistanceBias` knows how far all that is scored under it lies."""
        return True


@dataclass(frozen=True)
class Full(AttentionMask):
    """Every key."""

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch #heads length source"]:
        """True."""
        return jnp.ones((1, 1, query.shape[1], key.shape[1]), bool)

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """Attention over everything."""
        return scores.run()

    def keys_seen(self, length: int, causal: bool) -> float:
        """length, or its half."""
        return (length + 1) / 2 if causal else length

    def any_order(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class Window(AttentionMask):
    """Keys at less than `size` tokens: (i - size, i] where causal. Beltagy et al. 2020 (2004.05150); Mistral."""

    size: int = 4096
    """tokens seen, itself included (Mistral 7B: 4096)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """A window without tokens."""
        if self.size < 1:
            yield "size", "must be at least 1 token"

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch #heads length source"]:
        """|i - j| < size."""
        return (jnp.abs(query[:, :, None] - key[:, None, :]) < self.size)[:, None]

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """Attention with the kernel's own window; raises ValueError for a prefix, which would be seen from anywhere."""
        refuse_prefix(scores, "Window")
        return scores.run(window=(self.size - 1, 0 if scores.causal else self.size - 1))

    def keys_seen(self, length: int, causal: bool) -> float:
        """Past pairs of the band, or pairs of both sides, over length."""
        reach = min(self.size, length)
        past = reach * length - reach * (reach - 1) / 2
        return (past if causal else 2 * past - length) / length

    def any_order(self) -> bool:
        """Always: it goes by positions."""
        return True


@dataclass(frozen=True)
class Chunked(AttentionMask):
    """Keys of the same chunk of `size` tokens: LongNet's segments (Ding 2023, 2307.02486), Llama 4's local layers."""

    size: int = 8192
    """tokens of a chunk (Llama 4: 8192)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """A chunk without tokens."""
        if self.size < 1:
            yield "size", "must be at least 1 token"

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch #heads length source"]:
        """floor(i / size) == floor(j / size)."""
        return (query[:, :, None] // self.size == key[:, None, :] // self.size)[:, None]

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """Attention in which every chunk is a document of its own; raises ValueError for a prefix."""
        refuse_prefix(scores, "Chunked")
        return replace(scores, queries=self.parts(scores.queries), keys=self.parts(scores.keys)).run()

    def parts(self, tokens: Tokens) -> Tokens:
        """The tokens with chunks for documents: numbered along the row, or in a cache, which is one document."""
        chunk, ids = tokens.positions // self.size, present(tokens, tokens.segment_ids)
        if tokens.segment_ids is not None:
            new = (chunk[:, 1:] != chunk[:, :-1]) | (ids[:, 1:] != ids[:, :-1])
            chunk = jnp.cumsum(jnp.pad(new, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
        return replace(tokens, segment_ids=jnp.where(ids < 0, -1, chunk))

    def keys_seen(self, length: int, causal: bool) -> float:
        """Pairs of whole chunks and of the rest, over length."""
        sizes = [self.size] * (length // self.size) + [length % self.size]
        return sum(n * (n + 1) / 2 if causal else n * n for n in sizes) / length


def refuse_prefix(scores: Scores, name: str) -> None:
    """Raise ValueError where the batch has a prefix."""
    if scores.keys.prefix is not None:
        raise ValueError(f"mask={name} cannot show a prefix to tokens that are far from it: use mask=Full()")
