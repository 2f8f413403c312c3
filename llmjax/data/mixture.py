"""Several sources in one stream of rows."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmjax.data.codec import Codec
from llmjax.data.corpus import Corpus
from llmjax.data.reading import Reading, Split, digest
from llmjax.data.source import Source


@dataclass(frozen=True)
class Mixture(Source):
    """Sources mixed by weight: of any N training rows, source i gives N * weight[i] / sum(weights), within one row.

    Each source is shuffled and repeated by itself, so the row at a position is known without reading those before it.
    Validation reads the held-out documents of every source once, in order.
    """

    sources: tuple[Source, ...] = ()
    """The sources."""
    weights: tuple[float, ...] = ()
    """Shares of the training rows, one per source, positive; they need not sum to 1. Empty: equal shares."""

    def parts(self) -> tuple[tuple[Source, float], ...]:
        """The simple sources of all sources, each with its share of the whole."""
        weights = self.weights or (1.0,) * len(self.sources)
        found = []
        for source, weight in zip(self.sources, weights):
            inner = source.parts()
            total = sum(share for _, share in inner)
            found += [(part, weight / sum(weights) * share / total) for part, share in inner]
        return tuple(found)

    def documents(self, split: Split, reading: Reading) -> Iterator[str]:
        """The documents of every source, one source after the other (a tokenizer is trained on these)."""
        for source in self.sources:
            if source.has(split):
                yield from source.documents(split, reading)

    def fingerprint(self) -> str:
        """Hash of the sources, without their weights: a tokenizer does not depend on those."""
        return digest("mixture", [source.fingerprint() for source in self.sources])

    def has(self, split: Split) -> bool:
        """Whether any source is meant to have documents in `split`."""
        return any(source.has(split) for source in self.sources)

    def corpus(self, split: Split, codec: Codec, reading: Reading) -> Corpus:
        """A mixture has no corpus of its own: its parts have."""
        raise TypeError("ask each of parts() for its corpus")

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if not self.sources:
            yield "sources", "is empty: name at least one source"
        if self.weights and len(self.weights) != len(self.sources):
            yield "weights", f"must be {len(self.sources)} numbers, one per source, or empty for equal shares"
        if any(not 0 < weight < float("inf") for weight in self.weights):
            yield "weights", "must be positive: leave out a source that is not to be read"
