"""Where documents come from: the base classes of all sources."""

import abc
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.corpus import Corpus, cached_corpus
from llmjax.data.reading import Reading, Split, digest
from llmjax.data.splits import held_out


@dataclass(frozen=True)
class Source(abc.ABC):
    """Base of all sources: an ordered stream of documents for each split."""

    @abc.abstractmethod
    def documents(self, split: Split, reading: Reading) -> Iterator[str]:
        """The non-empty documents of `split`, always in the same order. Bad records go to `reading.bad`."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Content hash: another value whenever the documents may differ."""

    def has(self, split: Split) -> bool:
        """Whether this source is meant to have documents in `split`."""
        return True

    def parts(self) -> tuple[tuple["Source", float], ...]:
        """The simple sources that rows are drawn from, each with its share."""
        return ((self, 1.0),)

    def corpus(self, split: Split, codec: Codec, reading: Reading) -> Corpus:
        """The documents of `split` as tokens, memory-mapped from the cache; tokenised when they are not there yet.

        Raises:
            InputError: the split has no documents.
        """
        key = digest("corpus", self.fingerprint(), split, codec.fingerprint, reading.on_error)
        corpus = cached_corpus(reading.cache / "tokens" / key, lambda: self.documents(split, reading), codec, reading)
        if corpus is None:
            raise InputError(f"{self.label()} has no documents in its {split} split: {self.remedy(split)}")
        return corpus

    def label(self) -> str:
        """The source in a word or two, for messages."""
        return f"source {type(self).__name__}"

    def remedy(self, split: Split) -> str:
        """What to do when `split` turns out empty."""
        return "give it more documents"


@dataclass(frozen=True)
class HashSplitSource(Source):
    """Base of the sources without a split of their own: each document's hash decides, so order does not matter."""

    holdout: float = dataclasses.field(default=0.05, kw_only=True)
    """Fraction of the documents held out for validation, in [0, 1); 0 for none."""
    fold: int = dataclasses.field(default=0, kw_only=True)
    """Which fraction is held out: with holdout 1/k the folds 0 to k-1 make a k-fold cross-validation."""

    @abc.abstractmethod
    def located(self, reading: Reading) -> Iterator[tuple[str, str]]:
        """Every document with where it stands ("file:line"), in a fixed order."""

    def documents(self, split: Split, reading: Reading) -> Iterator[str]:
        """The non-empty documents of `split`; text that is not valid Unicode is a bad record."""
        for where, text in self.located(reading):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                reading.bad(f"{where}: the text holds half of a surrogate pair, which is not valid Unicode")
            elif text and held_out(text, self.holdout, self.fold) == (split == "validation"):
                yield text

    def has(self, split: Split) -> bool:
        """Whether this source is meant to have documents in `split`."""
        return split == "train" or self.holdout > 0

    def remedy(self, split: Split) -> str:
        """What to do when `split` turns out empty."""
        return f"holdout={self.holdout} of the documents go to validation: give more documents, or another holdout"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if not 0 <= self.holdout < 1:
            yield "holdout", "is no fraction: use one in [0, 1), for example 0.05"
        elif self.fold < 0 or (self.fold + 1) * self.holdout > 1 + 1e-9:
            yield "fold", "lies beyond the documents: folds run from 0 to 1/holdout - 1"


@dataclass(frozen=True)
class FileSource(HashSplitSource):
    """Base of the sources that read files: a path or a glob pattern, files in sorted order."""

    path: str = ""
    """A file, or a glob pattern such as "corpus/**/*.txt"."""

    @abc.abstractmethod
    def read(self, file: Path, reading: Reading) -> Iterator[tuple[str, str]]:
        """The documents of one file, each with where it stands."""

    def located(self, reading: Reading) -> Iterator[tuple[str, str]]:
        """Every document of every file; an empty file is a bad record."""
        for file in self.files():
            if file.stat().st_size == 0:
                reading.bad(f"{file}: the file is empty")
            else:
                yield from self.read(file, reading)

    def files(self) -> list[Path]:
        """The files, sorted. Raises InputError where there is none."""
        pattern = str(Path(self.path).expanduser())
        literal = [Path(pattern)] if Path(pattern).is_file() else []
        start = Path(pattern).anchor
        found = literal or sorted(file for file in Path(start).glob(pattern.removeprefix(start)) if file.is_file())
        if not found:
            raise InputError(f"{self.path!r}: there is no such file: give a file or a glob pattern")
        return found

    def fingerprint(self) -> str:
        """Hash of the files' bytes and of every field but the path: moving the files changes nothing."""
        fields = dataclasses.asdict(self) | {"path": "", "type": type(self).__name__}
        return digest(fields, [_file_digest(file) for file in self.files()])

    def label(self) -> str:
        """The source in a word or two, for messages."""
        return f"{type(self).__name__} {self.path}"


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
