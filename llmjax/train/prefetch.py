"""Batches made and put on the devices by a background thread, so that no step waits for its data."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Self

import jax
import numpy as np

AHEAD = 2


class Prefetch:
    """The batches of steps `start` to `stop`, `AHEAD` of them ready before they are asked for."""

    def __init__(
        self, batch: Callable[[int], Mapping[str, np.ndarray]], sharding: jax.sharding.Sharding, start: int, stop: int
    ) -> None:
        """`batch(step)` makes one; it runs in the thread."""
        self.waited = 0.0
        """Seconds that the last `take` waited."""
        self._batch, self._sharding = batch, sharding
        self._steps = range(start, stop)
        self._ready: queue.Queue[dict[str, jax.Array] | BaseException] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread."""
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()  # makes room for the batch that the thread may be waiting to hand over
            self._thread.join(timeout=0.01)

    def take(self) -> dict[str, jax.Array]:
        """The next batch, on the devices. Raises what making it raised."""
        start = time.perf_counter()
        item = self._ready.get()
        self.waited = time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            for step in self._steps:
                if self._closed.is_set():
                    return
                self._ready.put(put(self._batch(step), self._sharding))
        except BaseException as error:
            self._ready.put(error)


def put(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """The batch on the devices of all hosts, each taking its part."""
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for name, array in batch.items()
    }
