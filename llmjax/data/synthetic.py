"""Training data made by a synthetic task: no documents, no tokenizer, every row drawn from its own address."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.dataset import Batches, Dataset
from llmjax.data.packing import Batch, empty_batch
from llmjax.data.reading import digest
from llmjax.data.tasks.base import Task
from llmjax.data.tasks.recall import Recall


@dataclass(frozen=True)
class Synthetic(Dataset):
    """Rows of a task. The loss counts the task's answers only; the metric `accuracy` is the share of them."""

    task: Task = field(default_factory=Recall)
    """What the rows are."""
    eval_rows: int = 256
    """Held-out rows; they are drawn from addresses that training never uses."""
    eval_length: int | None = None
    """Tokens in a held-out row; None is `length`. Longer ones measure extrapolation."""

    def build(self, seed: int, cache_dir: str | Path | None = None) -> Batches:
        """Random access to the batches; nothing is read or kept."""
        return Draws(self, seed)

    def vocab(self) -> int:
        """Symbols of the task."""
        return self.task.symbols

    def problems(self) -> Iterator[tuple[str, str]]:
        """Rows that the task does not fit in."""
        yield from super().problems()
        if self.eval_rows < 1:
            yield "eval_rows", "is no number of rows: use for example 256"
        if self.eval_length is not None and self.eval_length < 1:
            yield "eval_length", "is no number of tokens: use for example 1024, or None for data.length"
        lengths = {self.length, self.length if self.eval_length is None else self.eval_length}
        for length in sorted(lengths):
            yield from ((f"task.{name}", why) for name, why in self.task.problems_in(length))


class Draws(Batches):
    """The rows of a task by number."""

    def __init__(self, config: Synthetic, seed: int) -> None:
        self.config, self.tokenizer, self._seed = config, Symbols(config.task.symbols), seed
        self.fingerprint = digest(type(config.task).__name__, asdict(config))

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Training rows `step * batch_size + i`, i < batch_size, or some of them."""
        wanted = range(self.config.batch_size)[rows or slice(None)]
        return self._rows(0, [step * self.config.batch_size + row for row in wanted], self.config.length)

    def eval_batches(self, max_batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """The held-out rows in order; what the last batch has no rows for is padding."""
        size, count = self.config.batch_size, self.config.eval_rows
        for start in range(0, count, size)[:max_batches]:
            numbers = list(range(start, min(start + size, count)))
            batch = self._rows(1, numbers, self.config.eval_length or self.config.length, size)
            yield {name: array[rows or slice(None)] for name, array in batch.items()}

    def _rows(self, split: int, numbers: Sequence[int], length: int, size: int | None = None) -> Batch:
        batch = empty_batch(size or len(numbers), length)
        for slot, number in enumerate(numbers):
            random = np.random.default_rng((self._seed, split, number))
            row = self.config.task.row(length, random)
            batch["tokens"][slot], batch["targets"][slot], batch["loss_mask"][slot] = row
            batch["positions"][slot], batch["segment_ids"][slot] = np.arange(length), 1
            batch["target_bytes"][slot] = 1
        return batch


class Symbols(Codec):
    """Token ids written out as numbers; a symbol counts as one byte."""

    def __init__(self, count: int) -> None:
        self.vocab_size, self.bos_id, self.eos_id = count, 0, 0
        self.token_bytes = np.ones(count, np.int32)
        self.fingerprint = f"symbols {count}"

    def encode(self, text: str) -> list[int]:
        """The numbers in `text`; raises InputError for anything else."""
        words = text.split()
        for word in words:
            if not (word.isdecimal() and int(word) < self.vocab_size):
                raise InputError(f"{word!r} is no symbol of this task: write numbers below {self.vocab_size}")
        return [int(word) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, a space before each."""
        return "".join(f" {number}" for number in ids)
