"""Datasets of the Hugging Face hub, through the `datasets` library (extra `hf`)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from llmjax.config import InputError
from llmjax.data.reading import Reading, digest
from llmjax.data.source import HashSplitSource


@dataclass(frozen=True)
class HuggingFace(HashSplitSource):
    """One split of a dataset of the Hugging Face hub; each row's text column is a document."""

    name: str = ""
    """Name on the hub ("owner/dataset"), or a local folder that `datasets.load_dataset` reads."""
    config: str = ""
    """Name of the dataset's configuration; empty for the default one."""
    split: str = "train"
    """Split that the documents come from, in the library's syntax; validation is held out of it by hash."""
    column: str = "text"
    """Name of the column that holds the text."""
    revision: str = "main"
    """Git revision of the dataset; a commit makes the data reproducible."""

    def located(self, reading: Reading) -> Iterator[tuple[str, str]]:
        """Every row's text. Raises InputError without the library, the dataset or the column."""
        try:
            import datasets
        except ImportError as error:
            raise InputError("HuggingFace sources need the extra `hf`: pip install 'llmjax[hf]'") from error
        try:
            rows = datasets.load_dataset(
                self.name,
                self.config or None,
                split=self.split,
                revision=self.revision,
                cache_dir=str(reading.cache / "huggingface"),
            )
        except (OSError, ValueError) as error:
            raise InputError(f"dataset {self.name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        if self.column not in rows.column_names:
            raise InputError(
                f"{self.name}: there is no column {self.column!r}; there are {', '.join(rows.column_names)}"
            )
        for number, text in enumerate(rows[self.column], 1):
            if isinstance(text, str):
                yield f"{self.name}: row {number}", text
            else:
                reading.bad(f"{self.name}: row {number}: column {self.column!r} holds {type(text).__name__}, not text")

    def fingerprint(self) -> str:
        """Hash of the names and the revision: the hub is not asked."""
        return digest(asdict(self), "huggingface")

    def label(self) -> str:
        """The source in a word or two, for messages."""
        return f"HuggingFace {self.name}"
