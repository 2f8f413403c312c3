"""JSON lines: one JSON object a line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmjax.data.reading import Reading
from llmjax.data.source import FileSource


@dataclass(frozen=True)
class JSONL(FileSource):
    """Files of JSON objects, one a line; each object's text field is a document. Blank lines are allowed."""

    field: str = "text"
    """Name of the field that holds the text."""

    def read(self, file: Path, reading: Reading) -> Iterator[tuple[str, str]]:
        """The documents of one file; a line that is no JSON object or lacks the field is a bad record."""
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    text = json_text(line, self.field, f"{file}:{number}", reading)
                    if text is not None:
                        yield f"{file}:{number}", text


def json_text(line: bytes, field: str, where: str, reading: Reading) -> str | None:
    """The string in `field` of the JSON object `line`, or None after reporting what is wrong with it."""
    try:
        return _field(line, field)
    except ValueError as error:
        reading.bad(f"{where}: {error}")
        return None


def _field(line: bytes, field: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{line[error.start]:02x} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("this JSON is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"this is a JSON {type(record).__name__}, not an object with a field {field!r}")
    if field not in record:
        present = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"there is no field {field!r}; the fields here are: {present}")
    if not isinstance(record[field], str):
        raise ValueError(f"field {field!r} holds a {type(record[field]).__name__}, not a string")
    return record[field]
