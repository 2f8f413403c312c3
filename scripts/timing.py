"""Times of jitted calls: a GPU's kernels by CUPTI, all else by the clock; samples of several calls taken in turn."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

MOST_REPEATS = 200


def timer() -> tuple[str, Callable[[Callable[[], Any], int], float]]:
    """(what is measured, the function that measures a call `repeats` times and gives seconds a call)."""
    if jax.default_backend() == "gpu":
        return "sum of kernel times by CUPTI", _kernels
    return "clock until ready, repeated calls", _clock


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 5, sample_seconds: float = 0.05
) -> dict[str, list[float]]:
    """`rounds` samples of each call in seconds, one of each in turn, so that drift of the machine meets all alike.

    Each call is made twice before (compilation, calibration); a sample repeats it for about `sample_seconds`.
    """
    _, measure = timer()
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        repeats[name] = max(1, min(MOST_REPEATS, math.ceil(sample_seconds / _clock(call, 1))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(measure(call, repeats[name]))
    return samples


def _clock(call: Callable[[], Any], repeats: int) -> float:
    """Seconds a call between a synchronised start and the last result's arrival."""
    started = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / repeats


def _kernels(call: Callable[[], Any], repeats: int) -> float:
    """Median over the calls of the time that their kernels ran; gaps between kernels are left out."""
    from jax.experimental.mosaic.gpu import profiler

    _, milliseconds = profiler.measure(call, iterations=repeats)()
    if milliseconds is None:
        raise RuntimeError("CUPTI saw no kernel")
    return statistics.median(milliseconds if isinstance(milliseconds, list) else [milliseconds]) / 1e3
