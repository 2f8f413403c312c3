"""What ties a run to its process: the lock on its directory, the signals that stop it, the cache of programs."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax

import llmjax
import pallas_kernels
from llmjax.config import InputError, leaves
from llmjax.data.reading import cache_folder

PACKAGES = ("llmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Distributions whose versions are saved with a run, and must be the same in all its processes."""


def use_compilation_cache() -> None:
    """Keep compiled programs in the cache folder between processes, unless jax has been told of another place."""
    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(InputError):  # without a home folder there is no cache, and that is no error
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock goes with the process, however that ends.

    Of several hosts' processes the first one holds it for all.

    Raises InputError where another process holds it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another process: wait for it, or name another directory") from None
        yield


def versions() -> dict[str, str | None]:
    """The installed version of each of `PACKAGES`; None where it is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def facts(experiment: Any) -> dict[str, str]:
    """What must be the same in all processes of a run: every field, the versions, and llmjax's own text."""
    digest = hashlib.sha256()
    for root in (Path(package.__path__[0]) for package in (llmjax, pallas_kernels)):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root.parent).as_posix().encode() + path.read_bytes())
    found = {path: repr(value) for path, value in leaves(experiment).items()}
    found |= {f"the version of {name}": str(version) for name, version in versions().items()}
    return found | {"the version of Python": platform.python_version(), "the source of llmjax": digest.hexdigest()}


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
