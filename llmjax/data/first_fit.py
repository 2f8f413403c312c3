"""First-fit packing: whole documents side by side in a row, planned from their lengths."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from llmjax.data.packing import Packing, PieceTable, Plan, document_pieces


@dataclass(frozen=True)
class FirstFit(Packing):
    """Each document goes, in order, into the first row with room for it (Johnson 1973); each is a segment of its own.

    A document longer than a row is cut into pieces of a row's length and a rest. Rows end in padding where nothing
    fits: at most one row is less than half full.
    """

    def plan(self, starts: Int64[np.ndarray, "documents+1"], length: int, evaluation: bool) -> Plan:
        """The table of pieces, for training and evaluation alike."""
        pieces = document_pieces(starts, length)
        rows = np.fromiter(first_fit((pieces[:, 1] - pieces[:, 0]).tolist(), length), np.int64, len(pieces))
        order = np.argsort(rows, kind="stable")
        return PieceTable(np.searchsorted(rows[order], np.arange(rows.max() + 2)), pieces[order])


def first_fit(sizes: list[int], capacity: int) -> Iterator[int]:
    """The row of each size: the first whose sizes so far leave room for it within `capacity`. O(n log n).

    A binary tree over the rows holds the largest free space below each node, so that the first row with room is found
    by going left wherever the left half has room.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    free = [capacity] * (2 * leaves)
    for size in sizes:
        node = 1
        while node < leaves:
            node = 2 * node + (free[2 * node] < size)
        yield node - leaves
        free[node] -= size
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
