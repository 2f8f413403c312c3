"""safetensors files: read by mmap with nothing believed that they say of themselves, written tensor by tensor.

A file is the length of its header (8 bytes, little-endian), the header as JSON, and the tensors' bytes one after
another. (The library of that name reads a file's tensors as copies and writes them from one dictionary in memory.)
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llmjax.config import InputError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_HEADER = 100_000_000
"""bytes of a header beyond which the library refuses a file, and so do we"""


class Kind(NamedTuple):
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read(path: Path) -> dict[str, np.ndarray]:
    """Views of a file's tensors by name; values are read from the disk when they are looked at.

    Raises InputError for a file that is missing, cut off, or whose header is not exactly true of it.
    """
    try:
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{path}: not readable: {error.strerror}") from None
    try:
        length = int.from_bytes(data[:8].tobytes(), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_unique)
        values = np.asarray(data)[8 + length :]  # a plain view: slices of a memmap object cost more
        slots = _slots(header, len(values))
        return {name: values[a:b].view(kind.dtype).reshape(kind.shape) for name, kind, a, b in slots}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as safetensors: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return dict(pairs)


def _slots(header: Any, size: int) -> list[tuple[str, Kind, int, int]]:
    """(name, kind, first byte, end) of all tensors, which fill `size` bytes without gaps; else ValueError."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    slots = [_slot(name, entry) for name, entry in header.items() if name != "__metadata__"]
    end = 0
    for name, _, start, stop in sorted(slots, key=lambda slot: slot[2:]):
        if start != end:
            raise ValueError(f"tensor {name} begins at byte {start}, not {end}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors take {end} bytes and {size} are there: was it cut off?")
    return slots


def _slot(name: str, entry: Any) -> tuple[str, Kind, int, int]:
    try:
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        kind = Kind(tuple(shape), DTYPES[entry["dtype"]])
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"tensor {name} is described as {str(entry)[:80]}") from None
    if not all(type(n) is int and n >= 0 for n in numbers) or stop - start != kind.nbytes:
        raise ValueError(f"tensor {name} of {entry['dtype']}{shape} cannot take bytes {start} to {stop}")
    return name, kind, start, stop


def write(path: Path, kinds: Mapping[str, Kind], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a file of `kinds`, the tensors in their order; one of them is in memory at a time.

    The file has its name only when it is whole. Raises OSError where the disk refuses.
    """
    names, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, kind in kinds.items():
        offsets = [end, end := end + kind.nbytes]
        header[name] = {"dtype": names[kind.dtype], "shape": list(kind.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, kind), (given, array) in zip(kinds.items(), tensors, strict=True):
                if (given, array.shape, array.dtype) != (name, *kind):
                    raise ValueError(f"{given} {array.dtype}{array.shape} where {name} {kind} was announced")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
