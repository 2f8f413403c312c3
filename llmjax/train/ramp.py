"""Batches that grow at the beginning of a run: GPT-3's ramp (Brown et al. 2020, 2005.14165, appendix B)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmjax.data.dataset import Batches
from llmjax.data.packing import Batch


@dataclass(frozen=True)
class BatchRamp:
    """rows(r) = start + (batch_size - start) r / over, r the rows trained on before; from r = `over` on all of them.

    A batch grows by whole microbatches, so the step is compiled once and none works on padding.
    """

    start: int = 16
    """Rows of the first update (GPT-3: 32k tokens, 16 rows of 2048)."""
    over: int = 1_953_125
    """Rows until the batch is whole (GPT-3: 4 to 12 billion tokens; 4 billion are this many rows of 2048)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        for name in ("start", "over"):
            if getattr(self, name) < 1:
                yield name, "is below 1: use at least 1 row"

    def microbatches(self, rows: int, accumulate: int) -> np.ndarray:
        """Microbatches of each update, int32, the last one that of all that follow: rounded down, at least one."""
        size, done, counts = rows // accumulate, 0, []
        while done < self.over:
            wanted = self.start + (rows - self.start) * done / self.over
            counts.append(max(int(wanted / size), 1))
            done += counts[-1] * size
        return np.array([*counts, accumulate], np.int32)

    def steps(self, rows: int, accumulate: int, wanted: int) -> int:
        """Updates until at least `wanted` rows are trained on."""
        done = np.cumsum(self.microbatches(rows, accumulate)[:-1].astype(np.int64)) * (rows // accumulate)
        if wanted <= done[-1]:
            return int(np.searchsorted(done, wanted)) + 1
        return len(done) - int((done[-1] - wanted) // rows)


class Ramped(Batches):
    """The rows of other batches in their order, as many in each update as a ramp says; the rest of a batch is empty."""

    def __init__(self, batches: Batches, ramp: BatchRamp, whole: Batch, accumulate: int) -> None:
        """`whole` is a batch whose rows hold nothing."""
        self._batches, self._whole, self._accumulate = batches, whole, accumulate
        self._rows = len(whole["tokens"])
        self._counts = ramp.microbatches(self._rows, accumulate)
        self._before = np.cumsum([0, *self._counts[:-1]], dtype=np.int64) * (self._rows // accumulate)
        self.tokenizer, self.fingerprint, self.skipped = batches.tokenizer, batches.fingerprint, batches.skipped

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of `step`, microbatches first to last row b, b + accumulate, ..., those that are not due empty."""
        last = len(self._counts) - 1
        count, first = self._counts[min(step, last)], self._before[min(step, last)] + max(step - last, 0) * self._rows
        wanted = np.arange(self._rows)[rows or slice(None)]
        filled = wanted % self._accumulate < count
        addresses = first + wanted // self._accumulate * count + wanted % self._accumulate
        batch = {name: array[wanted].copy() for name, array in self._whole.items()}
        for number in np.unique(addresses[filled] // self._rows):
            slots = np.flatnonzero(filled & (addresses // self._rows == number))
            held = addresses[slots] % self._rows
            part = self._batches.batch(int(number), slice(int(held[0]), int(held[-1]) + 1))
            for name, array in batch.items():
                array[slots] = part[name]
        return batch

    def eval_batches(self, max_batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """The others'."""
        return self._batches.eval_batches(max_batches, rows)

    def eval_text(self) -> bytes:
        """The others'."""
        return self._batches.eval_text()

    def train_text(self) -> bytes:
        """The others'."""
        return self._batches.train_text()
