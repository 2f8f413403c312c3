"""array_record files: the random-access record format of grain and tensorflow-datasets."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmjax.data.jsonl import json_text
from llmjax.data.reading import Reading
from llmjax.data.source import FileSource

CHUNK = 1024  # records read at a time


@dataclass(frozen=True)
class ArrayRecord(FileSource):
    """array_record files; each record is a document, as UTF-8 text or as a JSON object with a text field."""

    field: str = ""
    """Name of the JSON field that holds the text; empty: a record is the text itself."""

    def read(self, file: Path, reading: Reading) -> Iterator[tuple[str, str]]:
        """The documents of one file; a record that cannot be decoded is a bad record."""
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(file))
        if not reader.ok():
            return reading.bad(f"{file}: this is no array_record file, or it is damaged")
        for start in range(0, reader.num_records(), CHUNK):
            for number, record in enumerate(reader.read(start, min(start + CHUNK, reader.num_records())), start + 1):
                where = f"{file}: record {number}"
                text = json_text(record, self.field, where, reading) if self.field else _utf8(record, where, reading)
                if text is not None:
                    yield where, text
        reader.close()


def _utf8(record: bytes, where: str, reading: Reading) -> str | None:
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        reading.bad(f"{where}: byte 0x{record[error.start]:02x} is not UTF-8 text")
        return None
