"""What ties a run to its process: the lock on its directory, the signals that stop it, the cache of programs."""

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax

from llmjax.config import InputError
from llmjax.data.reading import cache_folder


def use_compilation_cache() -> None:
    """Keep compiled programs in the cache folder between processes, unless jax has been told of another place."""
    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(InputError):  # without a home folder there is no cache, and that is no error
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock goes with the process, however that ends.

    Raises InputError where another process holds it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another process: wait for it, or name another directory") from None
        yield


class StopSignals:
    """While entered, SIGTERM and SIGINT only set `received`; a second one changes nothing."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over; outside of the main thread, where that cannot be, leave them alone."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
