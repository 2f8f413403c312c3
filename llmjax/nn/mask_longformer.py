"""Longformer: a sliding window, dilated in some heads, and a few global tokens that see all and are seen by all."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.mask_parts import Part, by_heads, by_residue, merge, only, row_aligned
from llmjax.nn.masks import AttentionMask, refuse_prefix
from llmjax.nn.scores import Scores


@dataclass(frozen=True)
class Longformer(AttentionMask):
    """|i - j| <= d window with d dividing i - j, or j < globals, or i < globals. Beltagy et al. 2020 (2004.05150).

    Linear in the length. Global are the first tokens of a document ([CLS], the question).
    """

    window: int = 256
    """tokens seen on either side, d apart (paper: 256, its w = 512 counts both)"""
    globals: int = 1
    """tokens at the beginning of each document that all of it sees, and that see all of it"""
    dilations: tuple[int, ...] = (1,)
    """d of each head, repeated over the heads; 1 is a plain window (paper: two heads are dilated in upper layers)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Counts out of range."""
        for name in ("window", "globals"):
            if getattr(self, name) < 0:
                yield name, "must not be negative"
        if not self.dilations or min(self.dilations) < 1:
            yield "dilations", "must hold numbers of at least 1"

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch heads length source"]:
        """The window of each head, and the rows and columns of the global tokens."""
        i, j = query[:, None, :, None], key[:, None, None, :]
        dilations = jnp.resize(jnp.asarray(self.dilations), (heads,))[:, None, None]
        near = (jnp.abs(i - j) <= self.window * dilations) & ((i - j) % dilations == 0)
        return near | (i < self.globals) | (j < self.globals)

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """The window, the global keys, and the global queries' own rows; raises ValueError for a prefix."""
        refuse_prefix(scores, "Longformer")
        if not scores.aligned:
            return super().attend(scores)
        return self.joined(self.local(scores), scores)

    def local(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """What each token gets from its window and the global keys, one softmax over both."""
        heads = scores.query.shape[2]
        each = [self.dilations[head % len(self.dilations)] for head in range(heads)]
        kinds = sorted(set(each))
        groups = [[head for head in range(heads) if each[head] == d] for d in kinds]
        bare = replace(scores, sinks=None)
        others = replace(bare, keys=only(bare.keys, bare.keys.positions >= self.globals)) if self.globals else bare
        reach = (self.window, 0 if scores.causal else self.window)

        def window(part: Scores, i: int) -> Part:
            return by_residue(part, kinds[i], lambda row: row.run(window=reach, residual=True))

        parts = [by_heads(others, groups, window)]
        if self.globals:
            parts.append(self.global_keys(bare).run(residual=True))
        return merge(scores, parts)

    def global_keys(self, scores: Scores) -> Scores:
        """The scores of the global keys: the first columns, or in packed rows all columns with the rest absent."""
        if not row_aligned(scores):
            return replace(scores, keys=only(scores.keys, scores.keys.positions < self.globals))
        key, value = scores.key[:, : self.globals], scores.value[:, : self.globals]
        keys = jax.tree.map(lambda x: x[:, : self.globals], scores.keys)
        return replace(scores, key=key, value=value, keys=keys, aligned=False)

    def joined(
        self, local: Float[Array, "batch length heads value_dim"], scores: Scores
    ) -> Float[Array, "batch length heads value_dim"]:
        """`local` with full attention, by the queries, keys and values of `scores`, in the rows of global tokens.

        In rows of one document only the first queries are read. Where causal, a global token's past is global too.
        """
        if scores.causal or not self.globals:
            return local
        if not row_aligned(scores):
            there = scores.queries.positions < self.globals
            rows = replace(scores, queries=only(scores.queries, there)).run()
            return jnp.where(there[..., None, None], rows, local)
        queries = jax.tree.map(lambda x: x[:, : self.globals], scores.queries)
        rows = replace(scores, query=scores.query[:, : self.globals], queries=queries, aligned=False).run()
        return jnp.concatenate([rows, local[:, self.globals :]], axis=1)

    def keys_seen(self, length: int, causal: bool) -> float:
        """Window and global keys without those that are in both; the mean over the dilations."""
        i, few, totals = np.arange(length), self.globals, []
        for d in self.dilations:
            left = np.minimum(i // d, self.window)
            right = 0 if causal else np.minimum((length - 1 - i) // d, self.window)
            both = np.maximum(left - (i - few) // d, 0)
            seen = left + right + 1 + few - both
            totals.append(np.mean(np.where(i < few, i + 1 if causal else length, seen)))
        return float(np.mean(totals))
