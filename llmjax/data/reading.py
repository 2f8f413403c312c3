"""One pass over a source: where it may write, and what it does with a record that cannot be read."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from llmjax.config import InputError

Split = Literal["train", "validation"]


class Reading:
    """What a source is told when it is read, and what it reports back.

    Attributes:
        cache: folder that everything made from the data goes to; created on need.
        on_error: "raise" stops at the first bad record, "skip" counts it and goes on.
        skipped: bad records left out so far.
    """

    def __init__(self, cache: Path, on_error: Literal["raise", "skip"] = "raise") -> None:
        self.cache = cache
        self.on_error = on_error
        self.skipped = 0

    def bad(self, message: str) -> None:
        """Count a bad record, or raise InputError; `message` starts with its file and line."""
        if self.on_error == "raise":
            raise InputError(f"{message} (--data.on_error=skip leaves such records out)")
        self.skipped += 1

    def again(self) -> "Reading":
        """A fresh pass with the same settings and a count of its own."""
        return Reading(self.cache, self.on_error)


def cache_folder(path: str | Path | None = None) -> Path:
    """The cache folder: `path`, else the environment's LLMJAX_CACHE, else ~/.cache/llmjax. Created on need.

    Raises:
        InputError: there is no home folder, or the folder cannot be made.
    """
    try:
        folder = Path(path or os.environ.get("LLMJAX_CACHE") or Path.home() / ".cache" / "llmjax").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot make the cache folder ({error}): set LLMJAX_CACHE or --data.cache_dir") from error
    return folder


def digest(*parts: Any) -> str:
    """Content hash (32 hex digits of SHA-256) of JSON-able values: the same on every machine and in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]
