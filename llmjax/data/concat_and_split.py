"""Concatenate and split: the document stream cut into windows, no token of padding."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from llmjax.config import InputError
from llmjax.data.packing import Packing, Plan


@dataclass(frozen=True)
class ConcatAndSplit(Packing):
    """Windows of the stream of all documents (GPT-2 and after). A window may start and end inside documents."""

    cut_attention: bool = True
    """Documents in a window are segments that do not see each other; else a window is one segment."""
    shift: bool = True
    """Each training epoch cuts the stream elsewhere, so that windows are not the same in every epoch."""

    def plan(self, starts: Int64[np.ndarray, "documents+1"], length: int, evaluation: bool) -> Plan:
        """Windows of `length`; training leaves out the at most length - 1 tokens at an epoch's end.

        Raises:
            InputError: the training stream is shorter than one window.
        """
        total = int(starts[-1])
        if total < length and not evaluation:
            raise InputError(
                f"the training split has {total} tokens, fewer than one window of {length}: "
                "use a smaller data.length, more text, or packing Padded or FirstFit"
            )
        inner = starts[:-1] if self.cut_attention else starts[:1]
        return Windows(inner, total, length, evaluation, self.shift and not evaluation)


class Windows(NamedTuple):
    """The plan: row r is the stream from `offset + r * length`, which in training wraps around at the stream's end."""

    starts: Int64[np.ndarray, "documents"]
    total: int
    length: int
    evaluation: bool
    shifted: bool

    def __len__(self) -> int:
        """Number of rows: the last one is part empty in evaluation and left out in training."""
        return -(-self.total // self.length) if self.evaluation else self.total // self.length

    def pieces(self, row: int, shift: float) -> Int64[np.ndarray, "pieces 2"]:
        """(start, stop) of each document's part of the window."""
        offset = int(shift * self.total) if self.shifted else 0
        start = (offset + row * self.length) % self.total
        stop = start + self.length
        parts = [self._cut(start, min(stop, self.total))]
        if stop > self.total and not self.evaluation:
            parts.append(self._cut(0, stop - self.total))
        return np.concatenate(parts)

    def _cut(self, start: int, stop: int) -> Int64[np.ndarray, "pieces 2"]:
        low, high = np.searchsorted(self.starts, (start, stop), side="right")
        inner = self.starts[low : max(low, high)]
        bounds = np.concatenate([[start], inner[inner < stop], [stop]])
        return np.stack([bounds[:-1], bounds[1:]], axis=1)
