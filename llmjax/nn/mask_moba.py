"""Mixture of block attention: each head of each token chooses the past blocks that it looks into."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.mask_parts import Blocks, Part, blocks, by_heads, inside, merge, pick
from llmjax.nn.masks import AttentionMask, refuse_prefix
from llmjax.nn.scores import Scores, Tokens, present
from pallas_kernels.attention import merge_partials


@dataclass(frozen=True)
class MoBA(AttentionMask):
    """Own block, causally, and the `top_k` - 1 past blocks n of greatest q . mean(k of n). Lu et al. 2025 (2502.13189).

    Pairs of a query and a block are sorted by block, so that one block after another meets the queries that chose it:
    of n tokens n top_k size pairs are scored, and n^2 / size for the choice. No gradient flows through the choice.
    """

    size: int = 512
    """tokens of a block (paper: 512)"""
    top_k: int = 3
    """blocks seen, one's own included (paper: 3)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Blocks without tokens, or none of them."""
        for name in ("size", "top_k"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch 1 length source"]:
        """What may be chosen, which is everything: the choice is the scores' business."""
        return jnp.ones((query.shape[0], 1, query.shape[1], key.shape[1]), bool)

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """Own block and chosen blocks, merged; raises ValueError for a prefix and where it is not causal."""
        refuse_prefix(scores, "MoBA")
        if not scores.causal:
            raise ValueError("mask=MoBA chooses among past blocks: use causal=True")
        bare = replace(scores, sinks=None)
        parts = [inside(bare, self.size)]
        if self.top_k > 1 and scores.key.shape[1] >= self.size:
            # A bias by distance is a table of all heads, and here every head is a row: heads with one go one by one.
            heads = scores.query.shape[2]
            groups = [range(heads)] if scores.distance is None else [[head] for head in range(heads)]
            parts.append(by_heads(bare, groups, lambda part, _: self.chosen(part)))
        return merge(scores, parts)

    def chosen(self, scores: Scores) -> Part:
        """Attention to the chosen blocks: a row for each head, of pairs of a query and a block, sorted by block."""
        found = blocks(scores, self.size)
        choice = self.choose(scores, found)
        batch, heads, length, ranks = choice.shape
        pairs = choice.reshape(batch * heads, -1)
        order = jnp.argsort(pairs, axis=1)
        at = order // ranks
        query = pick(jnp.swapaxes(scores.query, 1, 2).reshape(batch * heads, length, 1, -1), at)
        where = jnp.take_along_axis(jnp.repeat(scores.queries.positions, heads, axis=0), at, axis=1)
        queries = Tokens(where, jnp.take_along_axis(pairs, order, axis=1))
        key, value = (rows(x, heads) for x in (found.key, found.value))
        count, size = found.key.shape[1:3]
        positions = (found.ends.positions[..., None] - size + 1 + jnp.arange(size)).reshape(batch, -1)
        keys = Tokens(positions, jnp.broadcast_to(jnp.repeat(jnp.arange(count), size), positions.shape))
        keys = jax.tree.map(lambda x: jnp.repeat(x, heads, axis=0), keys)
        pieces = replace(scores, query=query, key=key, value=value, queries=queries, keys=keys, aligned=False)
        part = pieces.run(residual=True)
        back = jnp.argsort(order, axis=1)
        out = pick(part[0], back).reshape(batch, heads, length, ranks, -1)
        lse = jnp.take_along_axis(part[1][..., 0], back, axis=1).reshape(batch, heads, length, ranks)
        return merge_partials(jnp.transpose(out, (3, 0, 2, 1, 4)), jnp.transpose(lse, (3, 0, 2, 1)))

    def choose(self, scores: Scores, found: Blocks) -> Int[Array, "batch heads length ranks"]:
        """Numbers of the past blocks of greatest score, taken in float32; -1 where there are fewer."""
        batch, length, heads, head_dim = scores.query.shape
        means = jnp.mean(found.key.astype(jnp.float32), axis=2)
        query = scores.query.astype(jnp.float32).reshape(batch, length, means.shape[2], -1, head_dim)
        gates = jnp.einsum("btkgd,bnkd->bkgtn", query, means).reshape(batch, heads, length, -1)
        ids, ends = present(scores.queries, scores.queries.segment_ids), present(found.ends, found.ends.segment_ids)
        past = scores.queries.positions[:, :, None] // self.size > found.ends.positions[:, None, :] // self.size
        there = past & (ids[:, :, None] == ends[:, None, :]) & (ends >= 0)[:, None, :]
        gates = jnp.where(there[:, None], gates, -jnp.inf)
        best, number = jax.lax.top_k(jax.lax.stop_gradient(gates), min(self.top_k - 1, gates.shape[-1]))
        return jnp.where(best > -jnp.inf, number, -1)

    def causal_only(self) -> bool:
        """Yes."""
        return True

    def keys_seen(self, length: int, causal: bool) -> float:
        """Those of the own block so far, and top_k - 1 blocks where there are as many; the choice is not counted."""
        i = np.arange(length)
        return float(np.mean(i % self.size + 1 + np.minimum(self.top_k - 1, i // self.size) * self.size))


def rows(
    x: Float[Array, "batch blocks size kv_heads dim"], heads: int
) -> Float[Array, "batch*heads blocks*size 1 dim"]:
    """Blocks of tokens as a row for each query head."""
    x = jnp.repeat(x, heads // x.shape[3], axis=3)
    return jnp.moveaxis(x, 3, 1).reshape(x.shape[0] * heads, -1, 1, x.shape[4])
