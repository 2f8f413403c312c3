"""Parquet files, read a row group at a time through pyarrow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmjax.config import InputError
from llmjax.data.reading import Reading
from llmjax.data.source import FileSource


@dataclass(frozen=True)
class Parquet(FileSource):
    """Parquet files; each row's text column is a document."""

    column: str = "text"
    """Name of the column that holds the text."""

    def read(self, file: Path, reading: Reading) -> Iterator[tuple[str, str]]:
        """The documents of one file; a null is a bad record. A missing or non-text column raises InputError."""
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowInvalid, OSError) as error:
            return reading.bad(f"{file}: this is no Parquet file ({str(error).splitlines()[0]})")
        with table:
            schema = table.schema_arrow
            if self.column not in schema.names:
                raise InputError(
                    f"{file}: there is no column {self.column!r}; the columns are: {', '.join(schema.names)}"
                )
            kind = schema.field(self.column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise InputError(f"{file}: column {self.column!r} holds {kind}, not text")
            row = 0
            for batch in table.iter_batches(columns=[self.column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        reading.bad(f"{file}: row {row}: column {self.column!r} is null")
                    else:
                        yield f"{file}: row {row}", text
