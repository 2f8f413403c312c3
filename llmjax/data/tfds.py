"""Any TensorFlow Datasets dataset, read through `tfds.data_source`: array_record files, TensorFlow never imported."""

import contextlib
import functools
import importlib.metadata
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmjax.config import InputError
from llmjax.data.reading import Reading, Split, digest
from llmjax.data.source import HashSplitSource


@dataclass(frozen=True)
class TFDS(HashSplitSource):
    """A dataset of the TFDS catalogue ("ag_news_subset", "lm1b:1.1.0"), downloaded and prepared on first use."""

    name: str = ""
    """Name, with configuration and version where they matter ("name/config:1.0.0")."""
    train: str = "train"
    """Split to train on, in TFDS syntax ("train[:90%]")."""
    validation: str = ""
    """Split to validate on; empty: `holdout` of the training split, by hash."""
    field: str = "text"
    """Name of the feature that holds the text."""
    data_dir: str = ""
    """Folder that holds prepared datasets; empty: the cache folder."""

    def documents(self, split: Split, reading: Reading) -> Iterator[str]:
        """The documents of `split`: of the dataset's own split where one is named, else by hash."""
        if not self.validation:
            yield from super().documents(split, reading)
            return
        for _, text in self._rows(self.validation if split == "validation" else self.train, reading):
            if text:
                yield text

    def located(self, reading: Reading) -> Iterator[tuple[str, str]]:
        """Every document of the training split."""
        yield from self._rows(self.train, reading)

    def has(self, split: Split) -> bool:
        """Whether there are documents in `split`: a validation split of its own, or a part held out."""
        return bool(self.validation) or super().has(split)

    def _rows(self, split: str, reading: Reading) -> Iterator[tuple[str, str]]:
        import tensorflow_datasets as tfds

        folder = Path(self.data_dir).expanduser() if self.data_dir else reading.cache / "tfds"
        make_builder = functools.partial(tfds.builder, self.name, data_dir=folder, file_format="array_record")
        try:
            features = make_builder().info.features
        except (ValueError, ImportError) as error:  # tfds lists its whole catalogue: the first line says it
            raise InputError(f"TFDS dataset {self.name!r}: {str(error).splitlines()[0]}") from error
        if self.field not in features:
            raise InputError(f"{self.name}: there is no field {self.field!r}; there are {', '.join(features)}")
        for number, record in enumerate(records(make_builder, split), 1):
            where = f"{self.name}[{split}]: record {number}"
            try:
                yield where, record[self.field].decode()
            except (UnicodeDecodeError, AttributeError):
                reading.bad(f"{where}: field {self.field!r} is not UTF-8 text")

    def fingerprint(self) -> str:
        """Hash of the names and of the library's version, which fixes the versions of its datasets."""
        fields = asdict(self) | {"data_dir": ""}
        return digest(fields, "tfds", importlib.metadata.version("tensorflow-datasets"))

    def label(self) -> str:
        """The source in a word or two, for messages."""
        return f"TFDS {self.name}"


def records(make_builder: Callable[[], Any], split: str) -> Sequence[dict[str, Any]]:
    """Random access to the records of `split`, prepared first where they are not there yet. Raises InputError."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    name = make_builder().name
    try:
        return _prepared(make_builder).as_data_source(split=split)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"TFDS dataset {name}[{split}] cannot be prepared: {message[0]}") from error


def _prepared(make_builder: Callable[[], Any]) -> Any:
    builder = make_builder()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it announces itself on stdout, where our JSON goes
            builder.download_and_prepare()
    except (ValueError, OSError):
        builder = make_builder()
        if not builder.is_prepared():  # else another process was first
            raise
    return builder
