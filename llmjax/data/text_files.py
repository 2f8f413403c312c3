"""Plain text files in UTF-8."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmjax.data.reading import Reading, Split
from llmjax.data.source import FileSource


@dataclass(frozen=True)
class TextFiles(FileSource):
    """UTF-8 text files: each file is a document, or each part between separators."""

    separator: str = ""
    r"""Text between two documents of a file, for example a blank line ("\n\n"); empty: a file is one document."""

    def read(self, file: Path, reading: Reading) -> Iterator[tuple[str, str]]:
        """The documents of one file; one that is not UTF-8 is a bad record, named with its first bad line."""
        data = file.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            reading.bad(f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 text")
            return
        for number, part in enumerate(text.split(self.separator) if self.separator else [text], 1):
            yield f"{file} (document {number})", part

    def remedy(self, split: Split) -> str:
        """What to do when `split` turns out empty."""
        advice = "" if self.separator else r"; separator='\n\n' makes documents of the paragraphs of a file"
        return super().remedy(split) + advice
