"""What zlib, bz2 and xz reach on the held-out bytes, in bits a byte: a yardstick that needs no model.

`alone`: 8 size(held out) / bytes. `given_training_text`: the same after the compressor has seen the training text. zlib
takes the last 32 kB of it as a preset dictionary (its whole window, RFC 1950); for bz2 and xz it is
8 (size(training + held out) - size(training)) / bytes, the conditional length of Cilibrasi and Vitanyi 2005
(cs/0312044). bz2 looks back over one block (900 kB), xz over 64 MB. Sizes include the formats' headers.
"""

import bz2
import lzma
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from llmjax.config import InputError
from llmjax.data import Data
from llmjax.data.reading import Reading, Split, cache_folder

ZLIB_WINDOW = 32768
LIMIT = 4 * 2**20
"""Bytes of each split up to which the comparison is made: xz takes about a second a megabyte."""


class Rate(NamedTuple):
    """Bits a byte of one compressor."""

    alone: float
    given_training_text: float


def rates(held_out: bytes, training: bytes) -> dict[str, Rate]:
    """Bits a byte of zlib, bz2 and xz at their strongest settings. Raises ValueError where nothing is held out."""
    if not held_out:
        raise ValueError("there are no held-out bytes to compress")
    sizes = {
        "zlib": (zlib_size(held_out), zlib_size(held_out, training[-ZLIB_WINDOW:])),
        "bz2": (bz2_size(held_out), bz2_size(training + held_out) - bz2_size(training)),
        "xz": (xz_size(held_out), xz_size(training + held_out) - xz_size(training)),
    }
    return {name: Rate(*(8 * size / len(held_out) for size in pair)) for name, pair in sizes.items()}


def zlib_size(data: bytes, dictionary: bytes = b"") -> int:
    """Bytes of the zlib stream of `data` at level 9, after a preset dictionary of at most 32 kB."""
    packer = zlib.compressobj(level=9, zdict=dictionary) if dictionary else zlib.compressobj(level=9)
    return len(packer.compress(data)) + len(packer.flush())


def bz2_size(data: bytes) -> int:
    """Bytes of the bzip2 stream of `data` at level 9."""
    return len(bz2.compress(data, compresslevel=9))


def xz_size(data: bytes) -> int:
    """Bytes of the xz stream of `data` at preset 9, extreme."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def compare(data: Data, limit: int = LIMIT) -> dict[str, Rate] | None:
    """`rates` on the texts of `data`; None where nothing is held out or a split is no text or exceeds `limit` bytes."""
    held_out, training = text(data, "validation", limit), text(data, "train", limit)
    return rates(held_out, training) if held_out and training is not None else None


def text(data: Data, split: Split, limit: int = LIMIT) -> bytes | None:
    """The documents of a split one after the other in UTF-8; None beyond `limit` bytes or where the source is no text.

    Reads no further than the limit, however large the source is.
    """
    reading = Reading(cache_folder(data.cache_dir), data.on_error)
    sources = [source for source, _ in data.source.parts() if source.has(split)]
    try:
        return joined((document for source in sources for document in source.documents(split, reading)), limit)
    except InputError:
        return None


def joined(documents: Iterable[str], limit: int) -> bytes | None:
    """The documents in UTF-8 one after the other, or None as soon as they exceed `limit` bytes."""
    pieces, size = [], 0
    for document in documents:
        pieces.append(document.encode())
        size += len(pieces[-1])
        if size > limit:
            return None
    return b"".join(pieces)
