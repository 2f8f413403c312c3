"""Multi-scale attention: near tokens one by one, far ones as means of groups that grow with the distance."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.mask_parts import Part, blocks, inside, merge
from llmjax.nn.masks import AttentionMask, Chunked, refuse_prefix
from llmjax.nn.scores import Scores


@dataclass(frozen=True)
class MultiScale(AttentionMask):
    """Exact keys in one's own block of b tokens and the one before; at level l >= 1 means of pooling^l keys and values.

    At level l blocks have b 2^(l - 1) tokens, and a token in block m sees the blocks before m - 1 whose parents (two
    blocks) are next to its own: m - 2, and m - 3 where m is odd. So every past token is in one group. A mean of c keys
    has its score plus log c, as c equal keys would. n log n / b means are scored for n tokens. The hierarchy is that of
    Zhu and Soricut 2021 (2107.11906).
    """

    block: int = 64
    """b, tokens of the smallest blocks"""
    pooling: Literal[1, 2] = 2
    """factor of the groups' size from level to level; 1 pools nothing, which is full attention"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Blocks that cannot be halved."""
        if self.block < 2 or self.block % 2:
            yield "block", "must be an even number of at least 2 tokens"

    def levels(self, length: int) -> list[tuple[int, int]]:
        """(tokens of a block, tokens of a group) of each level that tokens of `length` have blocks in."""
        count = max(math.ceil(math.log2(length / self.block)) - 1, 0) if length > self.block else 0
        return [(self.block * 2 ** (level - 1), self.pooling**level) for level in range(1, count + 1)]

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch 1 length source"]:
        """Everything, one by one or in a mean."""
        return jnp.ones((query.shape[0], 1, query.shape[1], key.shape[1]), bool)

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """All levels, merged; raises ValueError for a prefix, for a bias by distance and where it is not causal."""
        refuse_prefix(scores, "MultiScale")
        if not scores.causal or scores.distance is not None:
            raise ValueError("mask=MultiScale has means of past tokens: use causal=True and no bias by distance")
        bare = replace(scores, sinks=None)
        parts = [inside(bare, self.block)]
        if scores.key.shape[1] > self.block:
            parts.append(before(bare, self.block).run(window=(2 * self.block - 1, 0), residual=True))
        return merge(scores, [*parts, *(far(bare, *level) for level in self.levels(scores.key.shape[1]))])

    def takes_distance(self) -> bool:
        """No: a mean of keys has no one place."""
        return False

    def causal_only(self) -> bool:
        """Yes."""
        return True

    def keys_seen(self, length: int, causal: bool) -> float:
        """Exact keys, and means."""
        i = np.arange(length)
        seen = i % self.block + 1 + np.where(i >= self.block, self.block, 0)
        for size, group in self.levels(length):
            seen = seen + np.where(i >= 2 * size, (1 + i // size % 2) * (size // group), 0)
        return float(np.mean(seen))


def before(scores: Scores, size: int) -> Scores:
    """The scores with chunks of `size` tokens for documents, in which queries stand one chunk earlier than keys."""
    queries, keys = Chunked(size).parts(scores.queries), Chunked(size).parts(scores.keys)
    assert queries.segment_ids is not None
    earlier = jnp.where(queries.positions >= size, queries.segment_ids - 1, -1)
    return replace(scores, queries=replace(queries, segment_ids=earlier), keys=keys)


def far(scores: Scores, size: int, group: int) -> Part:
    """One level: the means of `group` tokens in blocks m - 2 and, for odd m, m - 3 of `size` tokens.

    The parents are next to each other where their numbers are (as documents), and blocks m - 1 and later are hidden as
    if they were in the future.
    """
    shifted = before(scores, 2 * size)
    found = blocks(replace(scores, keys=shifted.keys), group)
    key, value = (x.astype(jnp.float32).mean(axis=2).astype(x.dtype) for x in (found.key, found.value))
    queries = replace(shifted.queries, positions=shifted.queries.positions // size)
    where = found.ends.positions
    keys = replace(found.ends, positions=jnp.where(where < 0, -1, where // size + 2))
    pooled = replace(scores, key=key, value=value, queries=queries, keys=keys, aligned=False)
    out, lse = pooled.run(residual=True)
    return out, lse + math.log(group)
