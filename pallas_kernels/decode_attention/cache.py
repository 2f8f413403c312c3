"""What every implementation shares: the cache and its pages, which keys are seen, and how keys are cut into blocks."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Cache(NamedTuple):
    """Keys and values in pages; token p of sequence b lies in page `page_table[b, p // page_size]`."""

    key_pages: Float[Array, "pages page_size kv_heads head_dim"]
    value_pages: Float[Array, "pages page_size kv_heads value_dim"]
    page_table: Int[Array, "batch max_pages"]
    lengths: Int[Array, " batch"]

    @property
    def capacity(self) -> int:
        """The most tokens that one sequence can have."""
        return self.page_table.shape[1] * self.key_pages.shape[1]


@dataclass(frozen=True)
class Rule:
    """The static part of the scores: cap(scale q.k) for the keys at most `left` positions before the query."""

    scale: float
    left: int | None
    soft_cap: float | None


@dataclass(frozen=True)
class Config:
    """How a kernel cuts the keys. None where an implementation is to choose."""

    block_k: int | None = None
    """keys that are in work at a time"""
    splits: int | None = None
    """parts of the keys that are worked on independently and merged"""
    stages: int | None = None
    """blocks of keys and values on their way or in work at a time"""


def key_range(
    length: Int[Array, "..."], capacity: int, rule: Rule, queries: int
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """(first, stop) of the positions that any of the queries of a sequence sees; first = stop where there is none."""
    stop = jnp.clip(length, 0, capacity)
    first = jnp.zeros_like(stop) if rule.left is None else jnp.clip(length - queries - rule.left, 0, stop)
    return first, stop


def seen_by(
    cache: Cache, rule: Rule, queries: int, positions: Int[Array, "batch keys"]
) -> Bool[Array, "batch queries keys"]:
    """Whether query t, at position length - queries + t, sees the keys at `positions`."""
    at = cache.lengths[:, None] - queries + jnp.arange(queries, dtype=jnp.int32)
    distance = at[:, :, None] - positions[:, None, :]
    seen = (distance >= 0) & (positions < cache.capacity)[:, None, :]
    return seen if rule.left is None else seen & (distance <= rule.left)


def fetch(
    pages: Float[Array, "pages page_size kv_heads dim"],
    page_table: Int[Array, "batch max_pages"],
    positions: Int[Array, "batch keys"],
    present: Bool[Array, "batch keys"],
) -> Float[Array, "batch keys kv_heads dim"]:
    """The tokens at `positions`, zeros where they are not `present`: neither page nor content of those is looked at."""
    page_size = pages.shape[1]
    slots = jnp.clip(positions // page_size, 0, page_table.shape[1] - 1)
    page = jnp.clip(jnp.take_along_axis(page_table, slots, axis=1), 0, pages.shape[0] - 1)
    return jnp.where(present[:, :, None, None], pages[page, positions % page_size], 0)


@dataclass(frozen=True)
class Blocks:
    """Blocks of `size` keys that a kernel copies as `copies` pieces, each from one page, as `rows` tokens of it.

    A page that is longer than a block is cut into `per_page` of them, the last of which begins early enough to end with
    the page: the tokens that it repeats are not its own. Shorter pages are gathered, `copies` to a block.
    """

    size: int
    page_size: int
    copies: int

    @classmethod
    def of(cls, page_size: int, at_most: int) -> "Blocks":
        """Blocks of at most `at_most` keys: part of a page, or as many whole pages as fit."""
        if page_size >= at_most:
            return cls(at_most, page_size, 1)
        copies = at_most // page_size
        return cls(copies * page_size, page_size, copies)

    @property
    def rows(self) -> int:
        """Tokens in one copy."""
        return self.size // self.copies

    @property
    def per_page(self) -> int:
        """Blocks in a page; 1 where a block has several pages."""
        return -(-self.page_size // self.size) if self.copies == 1 else 1

    def of_position(self, position: Int[Array, "..."]) -> Int[Array, "..."]:
        """The block whose own token is at `position`."""
        unit = max(self.size, self.page_size)
        return position // unit * self.per_page + position % unit // self.size

    def span(self, block: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """(position of the block's first row, position of the first token that is its own)."""
        if self.copies > 1:
            return block * self.size, block * self.size
        page, part = block // self.per_page * self.page_size, block % self.per_page * self.size
        return page + jnp.minimum(part, self.page_size - self.size), page + part

    def share(
        self, first: Int[Array, ""], stop: Int[Array, ""], part: Int[Array, ""] | int, parts: int
    ) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The blocks (begin, end) that hold the `part`-th of `parts` shares of positions first to stop - 1."""
        begin = self.of_position(first)
        end = jnp.where(stop > first, self.of_position(jnp.maximum(stop - 1, 0)) + 1, begin)
        each = (end - begin + parts - 1) // parts
        return begin + part * each, jnp.minimum(begin + (part + 1) * each, end)
