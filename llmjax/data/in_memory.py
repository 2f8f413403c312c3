"""Documents given as Python strings."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from llmjax.data.reading import Reading, digest
from llmjax.data.source import HashSplitSource


@dataclass(frozen=True)
class InMemory(HashSplitSource):
    """Documents given in the experiment file itself."""

    texts: tuple[str, ...] = ()
    """The documents."""

    def located(self, reading: Reading) -> Iterator[tuple[str, str]]:
        """Every document with its number."""
        for number, text in enumerate(self.texts, 1):
            yield f"document {number} of InMemory", text

    def fingerprint(self) -> str:
        """Hash of the documents and the split."""
        return digest(asdict(self))
