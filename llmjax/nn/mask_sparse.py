"""Factorised attention of the Sparse Transformer: two sets of keys by which all earlier tokens are two hops away."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.mask_parts import (
    Part,
    by_heads,
    by_residue,
    delayed,
    inside,
    merge,
    padded,
    pick,
    row_aligned,
    some,
    whole,
)
from llmjax.nn.masks import AttentionMask, refuse_prefix
from llmjax.nn.scores import Scores, Tokens


@dataclass(frozen=True)
class SparseTransformer(AttentionMask):
    """Two sets of past keys j of a token i, with stride l. Child et al. 2019 (1904.10509), sections 4.3 and 5.2.

    strided: A1 = {i - l <= j}, A2 = {(i - j) mod l = 0}. fixed: A1 = {floor(i / l) = floor(j / l)}, A2 = {j mod l >=
    l - c}. With l near the root of the length both cost O(length^1.5). Layers that alternate between the sets have
    `heads="first"` and `heads="second"`.
    """

    pattern: Literal["strided", "fixed"] = "strided"
    """strided suits images and sound, fixed suits text"""
    stride: int = 128
    """l, tokens between columns (paper: 128 or 256)"""
    summary: int = 8
    """c, columns at the end of a chunk that all later tokens see; only the fixed pattern has them (paper: 8, 16, 32)"""
    heads: Literal["merged", "separate", "first", "second"] = "merged"
    """whether a head sees both sets, A1 if even and A2 if odd, only A1, or only A2"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sets that are empty or everything."""
        if self.stride < 2:
            yield "stride", "must be at least 2 tokens"
        elif self.pattern == "fixed" and not 0 < self.summary < self.stride:
            yield "summary", f"must be at least 1 and below stride={self.stride}"

    def visible(
        self, query: Int[Array, "batch length"], key: Int[Array, "batch source"], heads: int
    ) -> Bool[Array, "batch #heads length source"]:
        """A1, A2, their union, or one in even and the other in odd heads."""
        i, j, stride = query[:, None, :, None], key[:, None, None, :], self.stride
        if self.pattern == "strided":
            first, second = i - j <= stride, (i - j) % stride == 0
        else:
            first, second = i // stride == j // stride, j % stride >= stride - self.summary
        if self.heads == "separate":
            return jnp.where(jnp.arange(heads)[:, None, None] % 2 == 0, first, second)
        return {"merged": first | second, "first": first, "second": second}[self.heads]

    def attend(self, scores: Scores) -> Float[Array, "batch length heads value_dim"]:
        """Attention to A1 without A2 and to A2, merged; raises ValueError for a prefix and where it is not causal."""
        refuse_prefix(scores, "SparseTransformer")
        if not scores.causal:
            raise ValueError("mask=SparseTransformer is made of past tokens: use causal=True")
        if not scores.aligned:
            return super().attend(scores)
        bare = replace(scores, sinks=None)
        if self.heads == "merged":
            return merge(scores, [self.rest(bare), self.second(bare)])
        if self.heads == "separate":
            groups = [range(i, bare.query.shape[2], 2) for i in range(min(2, bare.query.shape[2]))]
            return merge(scores, [by_heads(bare, groups, lambda part, i: (self.first, self.second)[i](part))])
        return merge(scores, [self.first(bare) if self.heads == "first" else self.second(bare)])

    def first(self, scores: Scores) -> Part:
        """Attention to A1."""
        if self.pattern == "strided":
            return scores.run(window=(self.stride, 0), residual=True)
        return inside(scores, self.stride)

    def rest(self, scores: Scores) -> Part:
        """Attention to A1 without A2."""
        if self.pattern == "strided":
            return delayed(scores).run(window=(self.stride - 2, 0), residual=True)
        return inside(scores, self.stride, scores.keys.positions % self.stride < self.stride - self.summary)

    def second(self, scores: Scores) -> Part:
        """Attention to A2: along the columns of `[length / l, l]`, or to the summaries alone."""
        if self.pattern == "strided":
            return by_residue(scores, self.stride, whole)
        key, value, tokens = self.summaries(scores)
        return replace(scores, key=key, value=value, keys=tokens, aligned=False).run(residual=True)

    def summaries(
        self, scores: Scores
    ) -> tuple[Float[Array, "batch count kv_heads head_dim"], Float[Array, "batch count kv_heads value_dim"], Tokens]:
        """Keys, values and tokens of the summary columns; of n tokens, packed or not, at most n c / l are in one."""
        stride, length = self.stride, scores.key.shape[1]
        if row_aligned(scores):
            rows = padded(scores, stride)
            columns = np.flatnonzero(np.arange(rows.key.shape[1]) % stride >= stride - self.summary)
            ids = rows.keys.segment_ids
            tokens = Tokens(rows.keys.positions[:, columns], None if ids is None else ids[:, columns])
            return rows.key[:, columns], rows.value[:, columns], tokens
        where = scores.keys.positions
        chosen = (where >= 0) & (where % stride >= stride - self.summary)
        at, tokens = some(scores.keys, chosen, max(length * self.summary // stride, 1))
        return pick(scores.key, at), pick(scores.value, at), tokens

    def causal_only(self) -> bool:
        """Yes."""
        return True

    def keys_seen(self, length: int, causal: bool) -> float:
        """The mean of |A1 u A2|, or of |A1| or |A2|, or of both for heads of either kind."""
        i, stride = np.arange(length), self.stride
        if self.pattern == "strided":
            first, second = np.minimum(i, stride) + 1, i // stride + 1
            both = np.minimum(i, stride - 1) + second
        else:
            earlier = i // stride * self.summary
            first, second = i % stride + 1, earlier + np.maximum(i % stride - stride + self.summary + 1, 0)
            both = first + earlier
        seen = {"merged": both, "first": first, "second": second, "separate": (first + second) / 2}
        return float(np.mean(seen[self.heads]))
