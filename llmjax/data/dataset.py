"""What every kind of training data offers to a run: a config that builds random access to batches."""

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.packing import Batch, empty_batch


class Batches(abc.ABC):
    """Random access to the batches of a run. A batch is a function of (seed, step): resuming needs no state.

    It is a dict of arrays `[batch, length]`: tokens, targets, positions (from 0 in each segment, -1 for padding),
    segment_ids (1, 2, ...; 0 is padding) and target_bytes (UTF-8 bytes that the target stands for) in int32, loss_mask
    in float32.

    Attributes:
        tokenizer: the tokenizer, ready for use.
        fingerprint: content hash of all that the batches depend on, but for the seed.
        skipped: bad records left out.
    """

    tokenizer: Codec
    fingerprint: str
    skipped: int = 0

    @abc.abstractmethod
    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global training batch of `step` (from 0), or only those `rows` of it."""

    @abc.abstractmethod
    def eval_batches(self, max_batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """The held-out batches, in order, at most `max_batches`; raises InputError where nothing is held out."""

    def eval_text(self) -> bytes:
        """The held-out documents one after the other, in UTF-8. Raises InputError where there is no text."""
        raise InputError("this data holds no text")

    def train_text(self) -> bytes:
        """The training documents one after the other, in UTF-8. Raises InputError where there is no text."""
        raise InputError("this data holds no text")


@dataclass(frozen=True, kw_only=True)
class Dataset(abc.ABC):
    """Base of the kinds of data."""

    length: int = 256
    """Tokens in a row."""
    batch_size: int = 8
    """Rows in a global batch, over all devices and microbatches."""

    @abc.abstractmethod
    def build(self, seed: int, cache_dir: str | Path | None = None) -> Batches:
        """Random access to the batches. Raises InputError where the data cannot be read, or is too little."""

    def empty(self, rows: int) -> Batch:
        """A batch of so many rows that hold nothing: its arrays' names, shapes and dtypes."""
        return empty_batch(rows, self.length)

    def vocab(self) -> int | None:
        """Number of token ids, where it is known before anything is read."""
        return None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if self.length < 1:
            yield "length", "is no number of tokens: use for example 256"
        if self.batch_size < 1:
            yield "batch_size", "is no number of rows: use for example 8"
