"""The word problem of a symmetric group: what a sequence of permutations has made of the beginning."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from llmjax.data.tasks.base import Row, Task, next_symbol


@dataclass(frozen=True)
class Permutations(Task):
    """Token t is a permutation p_t of `degree` things, the answer p_t o ... o p_1. Merrill et al. 2024 (2404.08819).

    Permutations are numbered in lexicographic order. Of five things they form S5, whose word problem is complete for
    NC1: no fixed number of layers of attention, or of scans with diagonal decays, can do it at every length.
    """

    degree: int = 5
    """things that are permuted"""
    swaps: bool = False
    """whether tokens exchange two things only; their products are still all permutations"""
    chain: bool = False
    """whether each product, as a symbol of its own, is written after its token: a chain of thought, one step at a time
    (Feng et al. 2023, 2305.15408)"""

    @property
    def symbols(self) -> int:
        """degree!, twice where products are written out."""
        return math.factorial(self.degree) * (1 + self.chain)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Nothing to permute; a table without bounds."""
        if not 2 <= self.degree <= 6:
            yield "degree", "must lie between 2 and 6: there are degree! symbols"

    def problems_in(self, length: int) -> Iterator[tuple[str, str]]:
        """No tokens."""
        if length < 1:
            yield "degree", f"needs rows of 1 token, not {length}"

    def row(self, length: int, random: np.random.Generator) -> Row:
        """Random permutations, each as likely as the others, and their products so far."""
        listed, products = group(self.degree)
        moved = (listed != np.arange(self.degree)).sum(axis=1)
        drawn = np.flatnonzero(moved == 2) if self.swaps else np.arange(len(listed))
        steps = length // 2 + 1 if self.chain else length
        tokens = drawn[random.integers(len(drawn), size=steps)]
        reached = itertools.accumulate(tokens, lambda before, token: products[token, before])
        targets = np.fromiter(reached, np.int64, steps)
        if not self.chain:
            return Row(tokens, targets, np.ones(length, bool))
        symbols = np.stack([tokens, len(listed) + targets], axis=1).reshape(-1)[: length + 1]
        return next_symbol(symbols, np.arange(length + 1) % 2 == 1)


@functools.cache
def group(degree: int) -> tuple[Int[np.ndarray, "symbols degree"], Int[np.ndarray, "symbols symbols"]]:
    """The permutations in order, and the number of p o q, (p o q)(i) = p(q(i)), at [p, q]."""
    listed = list(itertools.permutations(range(degree)))
    number = {permutation: i for i, permutation in enumerate(listed)}
    products = [[number[tuple(p[i] for i in q)] for q in listed] for p in listed]
    return np.asarray(listed), np.asarray(products)
