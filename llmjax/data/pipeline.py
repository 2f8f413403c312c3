"""From sources to batches. A batch is a pure function of (seed, step): resuming needs no state, hosts need no talk."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llmjax.config import InputError
from llmjax.data.bpe import BPE
from llmjax.data.codec import Codec
from llmjax.data.concat_and_split import ConcatAndSplit
from llmjax.data.corpus import Corpus
from llmjax.data.dataset import Batches, Dataset
from llmjax.data.packing import Batch, Packing, Plan, empty_batch, fill_row
from llmjax.data.python_docs import PythonDocs
from llmjax.data.reading import Reading, Split, cache_folder, digest
from llmjax.data.source import Source
from llmjax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data(Dataset):
    """Documents, how they become tokens, and how tokens become batches."""

    source: Source = field(default_factory=PythonDocs)
    """Where the documents come from."""
    tokenizer: Tokenizer = field(default_factory=BPE)
    """How text becomes token ids."""
    packing: Packing = field(default_factory=ConcatAndSplit)
    """How documents become rows."""
    on_error: Literal["raise", "skip"] = "raise"
    """At a record that cannot be read: stop, or count it and go on."""
    cache_dir: str | None = None
    """Folder for what is made from the data; None: the environment's LLMJAX_CACHE, else ~/.cache/llmjax."""

    def build(self, seed: int, cache_dir: str | Path | None = None) -> "Pipeline":
        """The pipeline, with everything tokenised (from the cache, if it is there). `cache_dir` goes before the field.

        Raises:
            InputError: the data cannot be read, or is too little.
        """
        return Pipeline(self, seed, Reading(cache_folder(cache_dir or self.cache_dir), self.on_error))

    def vocab(self) -> int | None:
        """Ids of the tokenizer, where its config names them."""
        return getattr(self.tokenizer, "vocab_size", None)


class Part(NamedTuple):
    """One simple source, tokenised and planned."""

    source: Source
    weight: float
    train: Corpus
    train_plan: Plan
    validation: Corpus | None
    validation_plan: Plan | None


class Pipeline(Batches):
    """The batches that documents make; `skipped` counts bad records left out (on_error="skip")."""

    def __init__(self, config: Data, seed: int, reading: Reading) -> None:
        """Tokenise and plan; `Data.build` is the way here."""
        self.config = config
        self.tokenizer = config.tokenizer.resolve(config.source, reading)
        self._seed = seed
        self._reading = reading
        self._parts = [_part(*part, config, self.tokenizer, reading) for part in config.source.parts()]
        self._order = _order(self._parts, seed)
        self.skipped = sum(part.train.skipped for part in self._parts)
        corpora = [(p.weight, p.train.fingerprint, p.validation and p.validation.fingerprint) for p in self._parts]
        settings = (repr(config.packing), config.length, config.batch_size)
        self.fingerprint = digest(self.tokenizer.fingerprint, corpora, settings)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global training batch of `step` (from 0), or only those `rows` of it: a host reads only its own."""
        wanted = range(self.config.batch_size)[rows or slice(None)]
        batch = empty_batch(len(wanted), self.config.length)
        for slot, row in enumerate(wanted):
            index, epoch, plan_row = self._order[step * self.config.batch_size + row]
            part = self._parts[index]
            pieces = part.train_plan.pieces(plan_row, _shift(self._seed, index, epoch))
            fill_row(batch, slot, part.train, pieces, self.tokenizer)
        return batch

    def eval_batches(self, max_batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """The held-out batches, in order: each held-out token is a target exactly once; the last batch ends in padding.

        Args:
            max_batches: stop after this many; None for all.
            rows: only those rows of each batch.

        Raises:
            InputError: nothing is held out.
        """
        held_out = [part for part in self._parts if part.validation_plan is not None]
        if not held_out:
            raise InputError("nothing is held out for validation: set a holdout above 0, or switch evaluation off")
        order = ((part, row) for part in held_out for row in range(len(part.validation_plan or ())))
        size = self.config.batch_size
        for chunk in islice(iter(lambda: list(islice(order, size)), []), max_batches):
            batch = empty_batch(size, self.config.length)
            for slot, (part, row) in enumerate(chunk):
                if part.validation is not None and part.validation_plan is not None:
                    fill_row(batch, slot, part.validation, part.validation_plan.pieces(row, 0.0), self.tokenizer)
            yield {name: array[rows or slice(None)] for name, array in batch.items()}

    def eval_text(self) -> bytes:
        """The held-out documents one after the other, in UTF-8. Raises InputError where the source holds no text."""
        return self._text("validation")

    def train_text(self) -> bytes:
        """The training documents one after the other, in UTF-8. Raises InputError where the source holds no text."""
        return self._text("train")

    def _text(self, split: Split) -> bytes:
        sources = [part.source for part in self._parts if part.source.has(split)]
        return b"".join(text.encode() for source in sources for text in source.documents(split, self._reading.again()))


def _part(source: Source, weight: float, config: Data, codec: Codec, reading: Reading) -> Part:
    train = source.corpus("train", codec, reading.again())
    train_plan = config.packing.plan(train.starts, config.length, evaluation=False)
    if not source.has("validation"):
        return Part(source, weight, train, train_plan, None, None)
    validation = source.corpus("validation", codec, reading.again())
    validation_plan = config.packing.plan(validation.starts, config.length, evaluation=True)
    return Part(source, weight, train, train_plan, validation, validation_plan)


def _order(parts: list[Part], seed: int) -> Any:
    """Endless grain dataset of (part, epoch, row): each part's rows shuffled anew every epoch, mixed by weight."""
    from grain import MapDataset

    rows = []
    for index, part in enumerate(parts):
        shuffled = MapDataset.range(len(part.train_plan)).shuffle(seed=_word(seed, index)).repeat()
        rows.append(shuffled.map_with_index(functools.partial(_address, index, len(part.train_plan))))
    return MapDataset.mix(rows, [part.weight for part in parts])


def _address(part: int, count: int, position: int, row: int) -> tuple[int, int, int]:
    return part, position // count, int(row)


def _word(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@functools.lru_cache(maxsize=256)
def _shift(seed: int, part: int, epoch: int) -> float:
    return _word(seed, part, epoch) / 2**32
