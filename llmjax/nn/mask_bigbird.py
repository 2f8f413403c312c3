"""BigBird: blocks of tokens that see the first blocks, the blocks around them and a few blocks at random."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.mask_parts import only, padded, row_aligned
from llmjax.nn.masks import AttentionMask, refuse_prefix
from llmjax.nn.scores import Scores


@dataclass(frozen=True)
class BigBird(AttentionMask):
    """Block m sees n where n < g, or m < g, or |m - n| <= w / 2, or n is one of m's r random blocks.

    Zaheer et al. 2020 (2007.14062), global blocks inside the document (ITC). The random blocks are drawn once from the
    seed, the same for all heads, among those of a document of `length` that m does not see anyway; causality cuts the
    later ones off. Linear in the length: (g + w + r) blocks a block. In packed rows, where a block begins at any index,
    the mask is written out, `[length, length]`.
    """

    block: int = 64
    """tokens of a block (paper: 64)"""
    globals: int = 2
    """g, blocks at the beginning of the document that all see and that see all (paper: 2)"""
    window: int = 3
    """w, blocks seen around and with one's own, an odd number (paper: 3)"""
    random: int = 3
    """r, blocks drawn for each block (paper: 3)"""
    length: int = 4096
    """tokens of the longest document (paper: 4096)"""
    seed: int = 0
    """of the draws"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Counts out of range."""
        for name in ("block", "length"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1 token"
        for name in ("globals", "random", "seed"):
            if getattr(self, name) < 0:
                yield name, "must not be negative"
        if self.window < 1 or self.window % 2 == 0:
            yield "window", "must be odd: a block, and as many before it as after it"

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch 1 length source"]:
        """The blocks written out; raises ValueError for more keys than `length`."""
        self.check(key.shape[1])
        m, n = query // self.block, key // self.block
        listed = (jnp.asarray(table(self))[m][:, :, None] == n[:, None, :, None]).any(-1)
        return (listed | (m < self.globals)[:, :, None])[:, None]

    def check(self, length: int) -> None:
        """Raise ValueError for rows longer than `length`."""
        if length > self.length:
            raise ValueError(f"mask=BigBird has length={self.length}, a row has {length} tokens: give it that length")

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """Every block with the blocks it sees beside it; raises ValueError for a prefix or rows beyond `length`."""
        refuse_prefix(scores, "BigBird")
        length = scores.query.shape[1]
        if not row_aligned(scores):
            return super().attend(scores)
        self.check(length)
        out = self.listed(scores)
        few = min(self.globals * self.block, length)
        if scores.causal or not few:
            return out
        queries = jax.tree.map(lambda x: x[:, :few], scores.queries)
        rows = replace(scores, query=scores.query[:, :few], queries=queries, aligned=False).run()
        return jnp.concatenate([rows, out[:, few:]], axis=1)

    def listed(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """Attention of each block, a row of its own, to copies of the blocks in its line of the table."""
        rows, size = padded(scores, self.block), self.block
        batch, count = rows.query.shape[0], rows.query.shape[1] // size
        lines = np.where(table(self)[:count] < count, table(self)[:count], -1)

        def own(x: Array) -> Array:
            return x.reshape(batch * count, size, *x.shape[2:])

        def seen(x: Array) -> Array:
            blocks = x.reshape(batch, count, size, *x.shape[2:])[:, np.maximum(lines, 0)]
            return blocks.reshape(batch * count, -1, *x.shape[2:])

        there = jnp.tile(jnp.asarray(np.repeat(lines >= 0, size, axis=1)), (batch, 1))
        keys = only(jax.tree.map(seen, rows.keys), there)
        query, queries = own(rows.query), jax.tree.map(own, rows.queries)
        cut = replace(rows, query=query, key=seen(rows.key), value=seen(rows.value), queries=queries, keys=keys)
        out = replace(cut, aligned=False).run()
        return out.reshape(batch, -1, *out.shape[2:])[:, : scores.query.shape[1]]

    def keys_seen(self, length: int, causal: bool) -> float:
        """Pairs of tokens in pairs of blocks that see each other, over length; raises ValueError beyond `length`."""
        self.check(length)
        count = -(-length // self.block)
        sizes = np.full(count, self.block)
        sizes[-1] = length - (count - 1) * self.block
        active = (table(self)[:count, :, None] == np.arange(count)).any(1) | (np.arange(count) < self.globals)[:, None]
        pairs = active * sizes[:, None] * sizes
        if causal:
            pairs = np.tril(pairs, -1) + np.diag(sizes * (sizes + 1) // 2)
        return float(pairs.sum() / length)


@functools.cache
def table(config: BigBird) -> Int[np.ndarray, "blocks active"]:
    """The blocks that each block of a document of `length` sees even if it is not global itself; -1 fills the lines."""
    count, reach = -(-config.length // config.block), config.window // 2
    rows = np.full((count, config.globals + config.window + config.random), -1)
    for m in range(count):
        near = {*range(min(config.globals, count)), *range(max(m - reach, 0), min(m + reach + 1, count))}
        others = [n for n in range(count) if n not in near]
        draws = np.random.default_rng((config.seed, m)).permutation(len(others))[: config.random]
        seen = [*sorted(near), *(others[k] for k in draws)]
        rows[m, : len(seen)] = seen
    return rows
