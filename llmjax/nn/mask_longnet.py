"""LongNet: attention inside segments, to every r-th token of them, mixed over ever longer segments and larger r."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.mask_parts import Part, by_heads, by_residue, by_segment, inside, merge, only, row_aligned, whole
from llmjax.nn.masks import AttentionMask, Chunked, refuse_prefix
from llmjax.nn.scores import Scores


@dataclass(frozen=True)
class LongNet(AttentionMask):
    """sum_p alpha_p O_p with alpha_p = s_p / sum s, s_p the softmax denominator of pattern p = (segment w, dilation r).

    In O_p a token sees those of its segment where both are at h mod r in the segment, modulo r, for head h. The mixture
    is one softmax of the scores plus log c, c the number of patterns that show the pair; so a pair counts c times. Of n
    tokens a pattern scores n w / r^2 pairs (in packed rows n w / r). Ding et al. 2023 (2307.02486).
    """

    segments: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """w of each pattern (paper: these)"""
    dilations: tuple[int, ...] = (1, 2, 4, 6, 12)
    """r of each pattern (paper: these); 1 in one of them lets every token see itself"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Patterns that are not pairs, or without tokens."""
        if not self.segments or len(self.segments) != len(self.dilations):
            yield "dilations", f"must be as many as segments, {len(self.segments)}, and at least one"
        elif any(not 1 <= r <= w for w, r in self.patterns()):
            yield "dilations", f"must be at least 1 and at most their segments {self.segments}"

    def patterns(self) -> list[tuple[int, int]]:
        """(w, r) of each pattern."""
        return list(zip(self.segments, self.dilations, strict=True))

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch heads length source"]:
        """Pairs that some pattern shows."""
        shown = [self.shown(w, r, query, key, heads) for w, r in self.patterns()]
        return jnp.any(jnp.stack(shown), axis=0)

    def shown(
        self,
        segment: int,
        dilation: int,
        query: Int[Array, "batch length"],
        key: Int[Array, "batch source"],
        heads: int,
    ) -> Bool[Array, "batch heads length source"]:
        """Pairs that one pattern shows."""
        i, j = query[:, None, :, None], key[:, None, None, :]
        offset = (jnp.arange(heads) % dilation)[:, None, None]
        at_offset = (i % segment % dilation == offset) & (j % segment % dilation == offset)
        return (i // segment == j // segment) & at_offset

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """The patterns' outputs weighted by their denominators; raises ValueError for a prefix."""
        refuse_prefix(scores, "LongNet")
        bare = replace(scores, sinks=None)
        if scores.aligned:
            return merge(scores, [self.pattern(bare, w, r) for w, r in self.patterns()])
        ends = (scores.queries.positions, scores.keys.positions, scores.query.shape[2])
        return merge(scores, [bare.run(mask=self.shown(w, r, *ends), residual=True) for w, r in self.patterns()])

    def pattern(self, scores: Scores, segment: int, dilation: int) -> Part:
        """One pattern, the heads of each offset apart."""
        if dilation == 1:
            return inside(scores, segment)
        heads = scores.query.shape[2]
        groups = [range(offset, heads, dilation) for offset in range(min(dilation, heads))]
        if not row_aligned(scores):
            return by_heads(scores, groups, lambda part, offset: packed(part, segment, dilation, offset))
        size = min(segment, scores.query.shape[1])

        def dilated(part: Scores, offset: int) -> Part:
            return by_segment(part, size, lambda row: every(row, dilation, offset))

        return by_heads(scores, groups, dilated)

    def keys_seen(self, length: int, causal: bool) -> float:
        """Pairs scored, each as often as it is, over length; the mean over offsets, as heads are multiples of r."""
        total = 0.0
        for w, r in self.patterns():
            sizes = [min(w, length)] * (length // min(w, length)) + [length % min(w, length)]
            for offset in range(r):
                counts = [max(-(-(n - offset) // r), 0) for n in sizes]
                total += sum(n * (n + 1) / 2 if causal else n * n for n in counts) / r
        return total / length


def every(scores: Scores, dilation: int, offset: int) -> Part:
    """Attention among every `dilation`-th token of the rows from `offset` on; the others see nothing."""
    batch, length, heads, _ = scores.query.shape
    out = jnp.zeros((batch, length, heads, scores.value.shape[3]), scores.value.dtype)
    lse = jnp.full((batch, length, heads), -jnp.inf, jnp.float32)
    if offset >= length:
        return out, lse

    def take(x: Array) -> Array:
        return x[:, offset::dilation]

    sides = (scores.query, scores.key, scores.value, scores.queries, scores.keys)
    query, key, value, queries, keys = jax.tree.map(take, sides)
    few = whole(replace(scores, query=query, key=key, value=value, queries=queries, keys=keys))
    return out.at[:, offset::dilation].set(few[0]), lse.at[:, offset::dilation].set(few[1])


def packed(scores: Scores, segment: int, dilation: int, offset: int) -> Part:
    """The same in every segment of packed documents, whose offsets are at any index: other tokens are made absent."""
    sides = [
        only(Chunked(segment).parts(tokens), tokens.positions % segment % dilation == offset)
        for tokens in (scores.queries, scores.keys)
    ]
    return by_residue(replace(scores, queries=sides[0], keys=sides[1]), dilation, whole)
