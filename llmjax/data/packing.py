"""Rows out of documents: the plan of which pieces of the token stream make up each row, and the row itself.

A piece is a run of inputs `stream[start:stop]` inside one document; its targets are `stream[start + 1 : stop + 1]`,
where the beginning of a next document is replaced by the end-of-text id. A document of n tokens is n + 1 inputs
(beginning of text, t1, ..., tn) with targets (t1, ..., tn, end of text). The pieces of a plan cut the stream without
overlap, also where a window ends inside a document: the last input of a window has the first token of the next piece
as its target. So each token is a target exactly once, and its context is what stands before it in its piece.
"""

import abc
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int64

from llmjax.data.codec import Codec
from llmjax.data.corpus import Corpus

Batch = dict[str, np.ndarray]
INTEGERS = ("tokens", "targets", "positions", "segment_ids", "target_bytes")


class Plan(Protocol):
    """Random access to rows: known from the documents' lengths alone."""

    def __len__(self) -> int:
        """Number of rows in one pass over the documents."""

    def pieces(self, row: int, shift: float) -> Int64[np.ndarray, "pieces 2"]:
        """(start, stop) of each piece of a row; their lengths sum to at most the row's length.

        Args:
            row: which row, from 0.
            shift: in [0, 1), drawn anew for each epoch; a plan may cut the stream elsewhere by it.
        """


@dataclass(frozen=True)
class Packing(abc.ABC):
    """Base of all packings: how documents become rows of one length."""

    @abc.abstractmethod
    def plan(self, starts: Int64[np.ndarray, "documents+1"], length: int, evaluation: bool) -> Plan:
        """The rows of `length` tokens made of documents that start at `starts` (the last entry is the stream's length).

        An evaluation plan holds every token exactly once. A training plan may leave out the end of an epoch.
        """


class PieceTable(NamedTuple):
    """A plan as a table: row r is made of `table[rows[r] : rows[r + 1]]`."""

    rows: Int64[np.ndarray, "rows+1"]
    table: Int64[np.ndarray, "pieces 2"]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows) - 1

    def pieces(self, row: int, shift: float) -> Int64[np.ndarray, "pieces 2"]:
        """(start, stop) of each piece of a row, the same in every epoch."""
        return self.table[self.rows[row] : self.rows[row + 1]]


def document_pieces(starts: Int64[np.ndarray, "documents+1"], length: int) -> Int64[np.ndarray, "pieces 2"]:
    """(start, stop) of the documents in order, those longer than `length` cut into pieces of `length` and a rest."""
    lengths = np.diff(starts)
    counts = -(-lengths // length)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.repeat(starts[:-1], counts) + length * (np.arange(counts.sum()) - first)
    return np.stack([begin, np.minimum(begin + length, np.repeat(starts[1:], counts))], axis=1)


def empty_batch(rows: int, length: int) -> Batch:
    """A batch of padding: every array [rows, length], positions -1, all else zero."""
    batch = {name: np.full((rows, length), -(name == "positions"), np.int32) for name in INTEGERS}
    return batch | {"loss_mask": np.zeros((rows, length), np.float32)}


def fill_row(batch: Batch, row: int, corpus: Corpus, pieces: Int64[np.ndarray, "pieces 2"], codec: Codec) -> None:
    """Write `pieces` of `corpus` one after the other into `batch[...][row]`; what follows them stays padding."""
    at = 0
    for segment, (start, stop) in enumerate(pieces.tolist(), 1):
        span = slice(at, at + stop - start)
        stream = corpus.read(start, stop + 1)
        batch["tokens"][row, span] = stream[:-1]
        batch["targets"][row, span] = stream[1:]
        batch["positions"][row, span] = np.arange(stop - start)
        batch["segment_ids"][row, span] = segment
        batch["loss_mask"][row, span] = corpus.loss_mask(start, stop)
        at = span.stop
    targets = batch["targets"][row, :at]
    targets[targets == corpus.bos_id] = corpus.eos_id
    batch["target_bytes"][row, :at] = codec.token_bytes[targets]
