"""Python's own documentation (`pydoc_data.topics`, 465 kB of prose in every Python), as a TFDS dataset.

A topic is a document, and a topic's hash decides its split. Topics repeat whole paragraphs of each other, so training
leaves out every paragraph that also stands in a held-out topic, or shares a run of 50 characters with one (whitespace
normalised).
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmjax.data.reading import Reading, Split, digest
from llmjax.data.source import Source
from llmjax.data.splits import held_out
from llmjax.data.tfds import records

HOLDOUT, FOLD = 0.125, 4  # of the eight folds, the one whose size in bytes (7 %) is nearest to a usual holdout
WINDOW = 50


@dataclass(frozen=True)
class PythonDocs(Source):
    """The topics of Python's built-in help: what `make demo` trains on."""

    def documents(self, split: Split, reading: Reading) -> Iterator[str]:
        """The topics of `split` in a fixed order, read from array_record files made on first use."""
        folder = reading.cache / "tfds" / self.fingerprint()
        make_builder = functools.partial(_builder_class(), data_dir=folder, file_format="array_record")
        for record in records(make_builder, split):
            yield record["text"].decode()

    def fingerprint(self) -> str:
        """Hash of the topics (they differ between Python versions) and of the splitting rule."""
        return digest(
            "python_docs", 1, HOLDOUT, FOLD, WINDOW, hashlib.sha256(json.dumps(_topics()).encode()).hexdigest()
        )


def _topics() -> Mapping[str, str]:
    from pydoc_data.topics import topics

    return topics


@functools.cache
def _builder_class() -> Any:
    """The TFDS builder; made here because to define it is to import tfds."""
    import tensorflow_datasets as tfds

    class LocalInfo(tfds.core.DatasetInfo):
        """Does not look for a prepared copy on the network."""

        def initialize_from_bucket(self) -> None:
            pass

    class PythonDocsTopics(tfds.core.GeneratorBasedBuilder):
        """Topics of pydoc, split by topic."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # where tfds would look for checksums of downloads: there are none

        def _info(self) -> Any:
            text = tfds.features.Text()
            features = tfds.features.FeaturesDict({"topic": text, "text": text})
            return LocalInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: self._generate_examples(part) for name, part in split_topics(_topics()).items()}

        def _generate_examples(self, part: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
            for topic, text in part.items():
                yield topic, {"topic": topic, "text": text}

    return PythonDocsTopics


def split_topics(topics: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The topics of each split; training without the paragraphs that leak held-out text."""
    validation = {topic: text for topic, text in sorted(topics.items()) if held_out(topic, HOLDOUT, FOLD)}
    paragraphs = {_normalise(p) for text in validation.values() for p in _paragraphs(text)}
    windows = set().union(*(_windows(_normalise(text)) for text in validation.values()))

    def leaks(paragraph: str) -> bool:
        text = _normalise(paragraph)
        return text in paragraphs or not windows.isdisjoint(_windows(text))

    train = {}
    for topic, text in sorted(topics.items()):
        kept = [p for p in _paragraphs(text) if not leaks(p)] if topic not in validation else []
        if any(kept):
            train[topic] = "\n\n".join(kept)
    return {"train": train, "validation": validation}


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _normalise(text: str) -> str:
    return " ".join(text.split())


def _windows(text: str) -> set[str]:
    return {text[start : start + WINDOW] for start in range(len(text) - WINDOW + 1)}
