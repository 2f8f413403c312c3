"""Batches made and put on the devices by a background thread, so that no step waits for its data.

Each host makes only the rows that its own devices hold.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from llmjax.data.dataset import Batches
from llmjax.parallel.mesh import batch_sharding

AHEAD = 2


class Prefetch:
    """The batches of steps `start` to `stop`, `AHEAD` of them ready before they are asked for."""

    def __init__(self, batch: Callable[[int], dict[str, jax.Array]], start: int, stop: int) -> None:
        """`batch(step)` makes one and puts it on the devices; it runs in the thread."""
        self.waited = 0.0
        """Seconds that the last `take` waited."""
        self._batch = batch
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
                self._ready.put(self._batch(step))
        except BaseException as error:
            self._ready.put(error)


class Feed:
    """A run's batches of so many rows, on the devices of `mesh`."""

    def __init__(self, batches: Batches, rows: int, mesh: Mesh) -> None:
        self._batches, self._rows, self._sharding = batches, rows, batch_sharding(mesh)
        indices = self._sharding.addressable_devices_indices_map((rows, mesh.size)).values()
        spans = [index[0].indices(rows) for index in indices if index is not None]
        self._held = slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The training batch of `step`."""
        return self._put(self._batches.batch(step, self._held))

    def eval_batches(self, most: int | None) -> Iterator[dict[str, jax.Array]]:
        """The held-out batches, at most so many."""
        return map(self._put, self._batches.eval_batches(most, self._held))

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return put(batch, self._sharding, self._rows, self._held.start)


def put(
    batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, rows: int | None = None, first: int = 0
) -> dict[str, jax.Array]:
    """The batch of so many rows on the devices of all hosts; `batch` holds this host's, which begin at row `first`."""

    def place(array: np.ndarray) -> jax.Array:
        count = len(array) if rows is None else rows

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            return array[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}
