"""Tokenised documents on disk, memory-mapped: what every source is read as.

A folder holds `meta.json` and, for each shard, `00000.tokens` (little-endian unsigned integers) and
`00000.starts.npy` (where each document starts). Every document starts with the beginning-of-text id, so the file is
one stream in which the target of an input is the token after it; at the end of a document that is the end-of-text id.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.reading import Reading, digest

FORMAT = "llmjax-tokens-1"
BATCH_DOCUMENTS = 256
SHARD_TOKENS = 2**29


class Corpus:
    """A stream of documents, each beginning-of-text and its tokens.

    Attributes:
        starts: where document i starts in the stream; one more entry holds the stream's length.
        skipped: bad records left out when it was made.
        fingerprint: content hash.
        path: its folder.
    """

    starts: Int64[np.ndarray, "documents+1"]

    def __init__(self, path: Path) -> None:
        """Open the corpus in folder `path`. Raises InputError where a file is missing, cut off or of another format."""
        self.path = path
        try:
            meta, self._shards, starts = _open(path)
        except FileNotFoundError as error:
            raise InputError(f"{path} is no token folder: {Path(error.filename).name} is missing") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is a damaged token folder ({error}): write it again") from error
        self._bounds = np.cumsum([0, *map(len, self._shards)])
        self.starts = np.concatenate([s + offset for s, offset in zip(starts, self._bounds)] + [self._bounds[-1:]])
        self.bos_id, self.eos_id, self.vocab_size = meta["bos_id"], meta["eos_id"], meta["vocab_size"]
        self.skipped = meta["skipped"]
        self.fingerprint = digest(meta)

    def __len__(self) -> int:
        """Number of tokens in the stream, the one before each document included."""
        return int(self._bounds[-1])

    def read(self, start: int, stop: int) -> Int32[np.ndarray, "stop-start"]:
        """Tokens `start` to `stop` of the stream; after its end stands the beginning of a next document."""
        out = np.full(stop - start, self.bos_id, np.int32)
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while start < stop and number < len(self._shards):
            shard, first = self._shards[number], int(self._bounds[number])
            part = shard[start - first : stop - first]
            out[start - stop + len(out) :][: len(part)] = part
            start, number = start + len(part), number + 1
        return out

    def loss_mask(self, start: int, stop: int) -> Float32[np.ndarray, "stop-start"]:
        """Weight in the loss of the targets of inputs `start` to `stop`: 1 for each token of a text."""
        return np.ones(stop - start, np.float32)


def _open(path: Path) -> tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]:
    meta = json.loads((path / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise ValueError(f"the format is {meta['format']!r}, not {FORMAT!r}")
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    shards, starts = [], []
    for number, shard in enumerate(meta["shards"]):
        name = path / f"{number:05d}"
        tokens = np.memmap(name.with_suffix(".tokens"), dtype=dtype, mode="r")
        if len(tokens) != shard["tokens"]:
            raise ValueError(f"{name.name}.tokens holds {len(tokens)} tokens, not {shard['tokens']}")
        shards.append(np.asarray(tokens))  # a plain view: slicing a memmap object costs more than reading it
        starts.append(np.load(name.with_suffix(".starts.npy")))
    return meta, shards, starts


def write_token_shards(
    folder: str | Path,
    documents: Iterable[Sequence[int]],
    *,
    vocab_size: int,
    bos_id: int,
    eos_id: int,
    shard_tokens: int = SHARD_TOKENS,
    skipped: Callable[[], int] = lambda: 0,
) -> int:
    """Write token documents to `folder`, which appears whole or not at all. Empty documents are left out.

    Args:
        folder: the split's folder, for example "corpus/train"; must not exist.
        documents: token ids of each document, without special tokens.
        vocab_size: number of ids; two bytes a token where it is at most 65536, else four.
        bos_id: put before every document.
        eos_id: target after the last token of a document.
        shard_tokens: a shard is closed by the document that brings it to this many tokens.
        skipped: asked at the end for the number of bad records left out.

    Returns:
        The number of documents; with none, nothing is written.

    Raises:
        InputError: a token id is not in [0, vocab_size).
        FileExistsError: the folder is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        arrays = (_with_bos(ids, vocab_size, bos_id, dtype) for ids in documents if len(ids))
        shards = list(_write_shards(partial, arrays, shard_tokens))
        meta = {"format": FORMAT, "dtype": dtype, "vocab_size": vocab_size, "bos_id": bos_id, "eos_id": eos_id}
        (partial / "meta.json").write_text(json.dumps(meta | {"skipped": skipped(), "shards": shards}, indent=1))
        if shards:
            partial.chmod(0o755)
            partial.rename(folder)
    except OSError:
        if not folder.exists():  # else another process wrote the same thing first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(shard["documents"] for shard in shards)


def _with_bos(ids: Sequence[int], vocab_size: int, bos_id: int, dtype: str) -> np.ndarray:
    array = np.asarray(ids, np.int64)
    if array.min() < 0 or array.max() >= vocab_size:
        bad = array[(array < 0) | (array >= vocab_size)][0]
        raise InputError(f"token id {bad} is not in the vocabulary of {vocab_size} ids")
    return np.concatenate([[bos_id], array]).astype(dtype)


def _write_shards(folder: Path, arrays: Iterator[np.ndarray], shard_tokens: int) -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        starts, total, sha = [], 0, hashlib.sha256()
        with (folder / f"{number:05d}.tokens").open("wb") as out:
            for array in arrays:
                starts.append(total)
                total += len(array)
                data = array.astype(array.dtype.newbyteorder("<")).tobytes()
                sha.update(data)
                out.write(data)
                if total >= shard_tokens:
                    break
        if not starts:
            (folder / f"{number:05d}.tokens").unlink()
            return
        np.save(folder / f"{number:05d}.starts.npy", np.asarray(starts, np.int64))
        yield {"tokens": total, "documents": len(starts), "sha256": sha.hexdigest()}


def cached_corpus(
    folder: Path, documents: Callable[[], Iterator[str]], codec: Codec, reading: Reading
) -> Corpus | None:
    """The corpus in `folder`, made from `documents()` if it is not there or damaged; None where there are none."""
    if folder.exists():
        try:
            return Corpus(folder)
        except InputError:
            shutil.rmtree(folder)
    count = write_token_shards(
        folder,
        _encoded(documents(), codec),
        vocab_size=codec.vocab_size,
        bos_id=codec.bos_id,
        eos_id=codec.eos_id,
        skipped=lambda: reading.skipped,
    )
    return Corpus(folder) if count else None


def _encoded(documents: Iterator[str], codec: Codec) -> Iterator[list[int]]:
    while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
        yield from codec.encode_batch(batch)
