"""Attention side by side: every implementation of ours that fits, and what others offer; times, TFLOP/s, ratios.

    python -m scripts.bench_attention --json results.json --minutes 9     # on a GPU or TPU; run again to go on
    python -m scripts.bench_attention --quick                             # tiny shapes on any machine: does it run?

Shapes are those of the FlashAttention-3 paper (Shah et al. 2024, 2407.08608): 16k tokens in all, hidden width 2048,
bfloat16, random data. FLOPs of a forward pass are 2 B H T S (D + Dv), half of that where causal (T^2 / 2 pairs, of a
window W: T W - W^2 / 2; of packed documents: the sum over the documents), of a backward pass 2.5 times as many. Decode
is counted in bytes: the keys and values of the cache, read once. Medians of interleaved rounds; a result is written as
soon as it is known, and one that brought the process down stays marked and is not tried again.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention
from pallas_kernels.attention.registry import BACKENDS
from pallas_kernels.chips import chip_of
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.registry import BACKENDS as DECODE
from scripts.attention_peers import Attention, peers, segments
from scripts.timing import interleaved, timer

TOKENS, WIDTH = 16384, 2048
OURS = "ours "
UNFINISHED = "started, did not return"


@dataclass(frozen=True)
class Case:
    """One shape of attention; queries and keys are equally long."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    window: int | None = None
    """tokens that a query sees, its own included"""
    documents: int = 1

    def flops(self, direction: str) -> float:
        """Floating-point operations by the convention in the module's text."""
        each = self.length / self.documents
        pairs = self.documents * (each**2 / 2 if self.causal else each**2)
        if self.window is not None:
            pairs = self.length * self.window - self.window**2 / 2
        forward = 2 * self.batch * self.heads * pairs * (self.head_dim + self.value_dim)
        return forward if direction == "forward" else 2.5 * forward


@dataclass(frozen=True)
class DecodeCase:
    """One new token for each of `batch` sequences against caches of `length` tokens."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    page: int = 128

    @property
    def bytes(self) -> int:
        """Of the keys and values, bfloat16."""
        return self.batch * self.length * self.kv_heads * 2 * self.head_dim * 2


def cases() -> Iterator[Case | DecodeCase]:
    """The full list, what matters most first, so that a short run has it."""
    for length in (4096, 16384, 1024, 2048, 8192, 512):
        for dim in (128, 64, 256):
            for causal in (True, False):
                name = f"{'causal' if causal else 'full'} D{dim} T{length}"
                heads = WIDTH // dim
                yield Case(name, TOKENS // length, length, heads, heads, dim, dim, causal)
        if length == 4096:
            yield Case("packed 8 D128 T16384", 1, TOKENS, 16, 16, 128, 128, True, documents=8)
            yield Case("window 1k D128 T32768", 1, 32768, 16, 16, 128, 128, True, window=1024)
            yield Case("full causal D128 T32768", 1, 32768, 16, 16, 128, 128, True)
            yield Case("GQA 32/8 D128 T4096", 4, 4096, 32, 8, 128, 128, True)
            yield Case("MLA 192/128 T4096", 4, 4096, 16, 16, 192, 128, True)
            yield DecodeCase("decode 64 x 8k GQA 32/8", 64, 8192, 32, 8, 128)


def quick_cases() -> Iterator[Case | DecodeCase]:
    """The same features, tiny."""
    yield Case("causal D16 T64", 1, 64, 2, 2, 16, 16, True)
    yield Case("packed 8 D16 T64", 1, 64, 2, 2, 16, 16, True, documents=8)
    yield Case("window 8 D16 T64", 1, 64, 2, 2, 16, 16, True, window=8)
    yield Case("GQA 4/2 D16 T64", 1, 64, 4, 2, 16, 16, True)
    yield Case("MLA 24/16 T64", 1, 64, 2, 2, 24, 16, True)
    yield DecodeCase("decode 2 x 64", 2, 64, 4, 2, 16, page=16)


def ours(case: Case, name: str) -> Attention:
    """One of our implementations."""
    window = None if case.window is None else (case.window - 1, 0)

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        ids = segments(case, query.shape[0]) if case.documents > 1 else None
        options = dict(is_causal=case.causal, local_window_size=window, segment_ids=ids, implementation=name)
        return attention(query, key, value, **options)

    return run


def random(*shape: int) -> jax.Array:
    """Normal bfloat16 numbers."""
    return jax.random.normal(jax.random.key(len(shape) + shape[-1]), shape, jnp.bfloat16)


def calls(case: Case | DecodeCase, direction: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """For each implementation a function that prepares its call; it may raise what the implementation raises."""
    if isinstance(case, DecodeCase):
        return decode_calls(case)
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    lead = (case.batch, case.length)
    arrays = (
        random(*lead, case.heads, case.head_dim),
        random(*lead, case.kv_heads, case.head_dim),
        random(*lead, case.kv_heads, case.value_dim),
    )
    builders: dict[str, Callable[[], Attention]] = {}
    for name, backend in BACKENDS.items():
        if backend.runs_on(platform, kind):
            builders[OURS + name] = lambda name=name: ours(case, name)
    for name, peer in peers(platform).items():
        builders[name] = lambda peer=peer: peer(case)
    return {name: lambda build=build: passes(build(), arrays, direction) for name, build in builders.items()}


def passes(function: Attention, arrays: tuple[jax.Array, ...], direction: str) -> Callable[[], Any]:
    """A call of the forward pass, or of the backward pass alone, with what the forward pass saved."""
    if direction == "forward":
        jitted = jax.jit(function)
        return lambda: jitted(*arrays)
    out, pull = jax.jit(lambda *xs: jax.vjp(function, *xs))(*arrays)
    backward = jax.jit(lambda pull, d_out: pull(d_out))
    d_out = random(*out.shape).astype(out.dtype)
    return lambda: backward(pull, d_out)


def decode_calls(case: DecodeCase) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Our decode implementations, and a copy of the keys, which reads and writes as many bytes as decoding reads."""
    pages = case.length // case.page
    query = random(case.batch, case.heads, case.head_dim)
    keys, values = (random(case.batch * pages, case.page, case.kv_heads, case.head_dim) for _ in "kv")
    order = np.random.default_rng(0).permutation(case.batch * pages).reshape(case.batch, pages)
    table, lengths = jnp.asarray(order, jnp.int32), jnp.full((case.batch,), case.length, jnp.int32)

    def build(name: str) -> Callable[[], Any]:
        jitted = jax.jit(lambda *xs: decode_attention(*xs, implementation=name))
        return lambda: jitted(query, keys, values, table, lengths)

    def copy() -> Callable[[], Any]:
        jitted = jax.jit(lambda x: x + 1)
        return lambda: jitted(keys)

    here = (jax.default_backend(), jax.devices()[0].device_kind)
    found = {OURS + name: lambda name=name: build(name) for name, backend in DECODE.items() if backend.runs_on(*here)}
    return found | {"copy": copy}


class Results:
    """Rows by (case, direction, implementation), written to a file whenever one changes."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        if path is not None and path.exists():
            for row in json.loads(path.read_text())["rows"]:
                self.rows[row["case"], row["direction"], row["implementation"]] = row

    def put(self, case: Case | DecodeCase, direction: str, name: str, **values: Any) -> None:
        """Set a row and save."""
        self.rows[case.name, direction, name] = dict(case=case.name, direction=direction, implementation=name, **values)
        if self.path is not None:
            about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "timer": timer()[0]}
            self.path.write_text(json.dumps(about | {"rows": list(self.rows.values())}, indent=1) + "\n")

    def drop(self, case: Case | DecodeCase, direction: str, names: Iterable[str]) -> None:
        """Forget rows."""
        for name in names:
            self.rows.pop((case.name, direction, name), None)

    def time(self, case: str, direction: str, name: str) -> float | None:
        """Milliseconds of a row that has them."""
        return self.rows.get((case, direction, name), {}).get("ms")


def bench(case: Case | DecodeCase, direction: str, results: Results, rounds: int, sample_seconds: float) -> None:
    """Measure what has no row yet; a row holds times or the reason why there are none."""
    ready = {}
    for name, prepare in calls(case, direction).items():
        if (case.name, direction, name) in results.rows:
            continue
        results.put(case, direction, name, error=UNFINISHED)
        try:
            call = prepare()
            jax.block_until_ready(call())
        except Exception as error:  # whatever another library raises, or a device out of memory, is a result here
            results.put(case, direction, name, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            stop_if_lost()
        else:
            results.drop(case, direction, [name])
            ready[name] = call
    for name, samples in interleaved(ready, rounds, sample_seconds).items():
        seconds = statistics.median(samples)
        values = {"ms": 1e3 * seconds, "spread": (max(samples) - min(samples)) / seconds}
        if isinstance(case, DecodeCase):
            values["GB/s"] = case.bytes / seconds / 1e9
        else:
            values["TFLOP/s"] = case.flops(direction) / seconds / 1e12
        results.put(case, direction, name, **values)
        print(f"{case.name:26} {direction:8} {name:20}", *(f"{v:10.3f} {k}" for k, v in values.items()), flush=True)


def stop_if_lost() -> None:
    """End the run where an error took the device with it: nothing would work from here on."""
    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except RuntimeError:
        sys.exit("the device is lost: run again with the same --json to go on after the call that did it")


def table(results: Results, chosen: list[Case | DecodeCase]) -> list[str]:
    """Our fastest implementation against each other one: how many times faster (above 1) we are."""
    lines = ["", "case                       pass      ours (fastest)      ms  x peer"]
    for case in chosen:
        for direction in directions(case):
            rows = {name: row for (c, d, name), row in results.rows.items() if (c, d) == (case.name, direction)}
            mine = {name: row["ms"] for name, row in rows.items() if name.startswith(OURS) and "ms" in row}
            if not mine:
                continue
            name = min(mine, key=lambda n: mine[n])
            others = [
                f"{row['ms'] / mine[name]:.2f} {peer}" for peer, row in rows.items() if peer not in mine and "ms" in row
            ]
            lines.append(f"{case.name:26} {direction:8} {name:14} {mine[name]:9.3f}  {', '.join(others)}")
    return lines + goals(results, chosen)


def goals(results: Results, chosen: list[Case | DecodeCase]) -> list[str]:
    """The ratios that compare one case with another: packing, windows, decode."""
    lines = []
    for case in chosen:
        for name in [OURS + backend for backend in (*BACKENDS, *DECODE)]:
            for direction in directions(case):
                ms = results.time(case.name, direction, name)
                if ms is None:
                    continue
                what = f"{case.name}, {direction}, {name}:"
                if isinstance(case, DecodeCase):
                    copy = results.rows.get((case.name, direction, "copy"), {}).get("GB/s")
                    if copy is not None:
                        lines.append(f"{what} {case.bytes / ms / 1e6 / copy:.2f} of copy bandwidth")
                elif case.documents > 1:
                    alone = f"causal D{case.head_dim} T{case.length // case.documents}"
                    apart = results.time(alone, direction, name)
                    if apart is not None:
                        lines.append(f"{what} {ms / apart:.2f} x the time of its documents as a batch")
                elif case.window is not None:
                    whole = results.rows.get((f"full causal D{case.head_dim} T{case.length}", direction, name), {})
                    if "TFLOP/s" in whole:
                        share = case.flops(direction) / ms / 1e9 / whole["TFLOP/s"]
                        lines.append(f"{what} {share:.2f} x the TFLOP/s of full causal attention")
    return sorted(set(lines))


def directions(case: Case | DecodeCase) -> tuple[str, ...]:
    """The passes that a case has."""
    return ("forward",) if isinstance(case, DecodeCase) else ("forward", "backward")


def main() -> None:
    """Measure, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--cases", default="", help="a regular expression that a case's name must contain")
    parser.add_argument("--json", type=Path, help="written as results come; results in it are not measured again")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no new case after this time")
    given = parser.parse_args()
    if jax.default_backend() == "cpu" and not given.quick:
        parser.error("this machine has no GPU or TPU: only --quick runs here")
    every = quick_cases() if given.quick else cases()
    chosen = [case for case in every if re.search(given.cases, case.name)]
    chip = chip_of(jax.devices()[0].device_kind)
    peak = f", bfloat16 peak {chip.flops / 1e12:.0f} TFLOP/s" if chip else ""
    print(f"{jax.devices()[0].device_kind}{peak}, jax {jax.__version__}; {timer()[0]}")
    results, deadline = Results(given.json), time.monotonic() + 60 * given.minutes
    todo = [(case, direction) for case in chosen for direction in directions(case)]
    for done, (case, direction) in enumerate(todo):
        if time.monotonic() > deadline:
            print(f"time is up after {done} of {len(todo)}: run again with the same --json to go on")
            break
        bench(case, direction, results, *((2, 0.002) if given.quick else (5, 0.05)))
    for (case_name, direction, name), row in results.rows.items():
        if "error" in row:
            print(f"{case_name}, {direction}, {name}: {row['error']}")
    print("\n".join(table(results, chosen)))


if __name__ == "__main__":
    main()
