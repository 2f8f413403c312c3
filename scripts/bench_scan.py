"""Scans side by side: every implementation of ours that runs here, `lax.scan` over time, `associative_scan`.

    python -m scripts.bench_scan --json results.json    # shapes of models on a GPU or TPU, small ones on a CPU
    python -m scripts.bench_scan --quick                # tiny shapes: does it run?

Random data: bfloat16 on a device, float32 on a CPU, weights and decays float32 where the function takes them so.
"lax.scan" is the definition, one token after the other; "associative_scan" holds all states at once, and is there for
the functions whose states are small. A pass is the forward pass, or forward and backward pass in one program with
gradients of every argument. Medians of interleaved rounds; the table of ratios (above 1 we are faster) comes last.
"""

import argparse
import functools
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chips import target
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_delta_rule.registry import BACKENDS as DELTA
from pallas_kernels.gated_linear_attention import gated_linear_attention, ssd
from pallas_kernels.gated_linear_attention.registry import BACKENDS as LINEAR
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.linear_recurrence.registry import BACKENDS as RECURRENCE
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan.registry import BACKENDS as SELECTIVE
from scripts.timing import interleaved, timer

FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "selective_scan": (selective_scan, dict(SELECTIVE)),
    "ssd": (ssd, dict(LINEAR)),
    "gated_linear_attention": (gated_linear_attention, dict(LINEAR)),
    "gated_delta_rule": (gated_delta_rule, dict(DELTA)),
    "linear_recurrence": (linear_recurrence, dict(RECURRENCE)),
}
PASSES = ("forward", "forward+backward")
PEERS = ("lax.scan", "associative_scan")


@dataclass(frozen=True)
class Case:
    """One shape of one function."""

    function: str
    batch: int
    length: int
    heads: int
    """channels, where the function has no heads"""
    key_dim: int
    """the state's, where the function has no keys"""
    value_dim: int = 1

    @property
    def name(self) -> str:
        """What it is called in the results."""
        return f"{self.function} B{self.batch} T{self.length} H{self.heads} N{self.key_dim} P{self.value_dim}"

    def arrays(self, dtype: Any) -> tuple[Array, ...]:
        """Random arguments of the function, decays between 0 and 1."""
        lead = (self.batch, self.length)
        keys = iter(jax.random.split(jax.random.key(0), 8))
        heads, state, value = self.heads, self.key_dim, self.value_dim

        def normal(*shape: int) -> Array:
            return jax.random.normal(next(keys), (*lead, *shape), dtype)

        def positive(*shape: int) -> Array:
            return jax.random.uniform(next(keys), shape, jnp.float32, 0.01, 1.0)

        if self.function == "linear_recurrence":
            return positive(*lead, heads).astype(dtype), normal(heads)
        if self.function == "selective_scan":
            x, dt = normal(heads), positive(*lead, heads).astype(dtype)
            return x, dt, -positive(heads, state), normal(1, state), normal(1, state)
        if self.function == "ssd":
            x, dt = normal(heads, value), positive(*lead, heads)
            return x, dt, -positive(heads), normal(1, state), normal(1, state)
        arrays = [normal(heads, n) for n in (state, state, value)]
        if self.function == "gated_delta_rule":
            arrays[1] /= jnp.linalg.norm(arrays[1].astype(jnp.float32), axis=-1, keepdims=True).astype(dtype)
            return *arrays, positive(*lead, heads), -positive(*lead, heads)
        return *arrays, -positive(*lead, heads, state)


def cases(platform: str) -> Iterator[Case]:
    """Shapes of models, or of a length of 4096 that a CPU has time for."""
    if platform == "cpu":
        yield Case("selective_scan", 1, 4096, 256, 16)
        yield Case("ssd", 1, 4096, 4, 64, 64)
        yield Case("gated_linear_attention", 1, 4096, 4, 64, 64)
        yield Case("gated_delta_rule", 1, 4096, 4, 64, 64)
        yield Case("linear_recurrence", 1, 4096, 1024, 1)
    else:
        yield Case("selective_scan", 8, 2048, 4096, 16)
        yield Case("selective_scan", 1, 2048, 4096, 16)
        yield Case("ssd", 8, 2048, 80, 128, 64)
        yield Case("gated_linear_attention", 8, 2048, 16, 128, 128)
        yield Case("gated_delta_rule", 8, 2048, 16, 128, 128)
        yield Case("linear_recurrence", 8, 2048, 4096, 1)


def quick_cases() -> Iterator[Case]:
    """Every function, tiny."""
    for function in FUNCTIONS:
        yield Case(function, 1, 64, 4, 8, 8)


def affine(decay: Array, value: Array) -> Array:
    """All states of h_t = decay_t h_{t-1} + value_t at once, in float32, time on axis 1 (Blelloch 1990)."""

    def after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(after, (decay, value), axis=1)[1]


def associative_selective(x: Array, dt: Array, A: Array, B: Array, C: Array) -> tuple[Array, Array]:
    """The selective scan with one group of B and C, plainly."""
    wide = [v.astype(jnp.float32) for v in (x, dt, B, C)]
    states = affine(jnp.exp(wide[1][..., None] * A), (wide[0] * wide[1])[..., None] * wide[2])
    return jnp.einsum("btdn,btgn->btd", states, wide[3]).astype(x.dtype), states[:, -1]


def associative_recurrence(a: Array, b: Array) -> tuple[Array, Array]:
    """The linear recurrence, plainly."""
    states = affine(a.astype(jnp.float32), b.astype(jnp.float32))
    return states.astype(b.dtype), states[:, -1]


ASSOCIATIVE: dict[str, Callable[..., Any]] = {
    "selective_scan": associative_selective,
    "linear_recurrence": associative_recurrence,
}


def sides(case: Case) -> dict[str, Callable[..., Any]]:
    """Each implementation as a function of the case's arrays; the quadratic one is no scan."""
    function, backends = FUNCTIONS[case.function]
    found: dict[str, Callable[..., Any]] = {}
    for name, backend in backends.items():
        if backend.runs_on(*target()) and name != "quadratic":
            label = "lax.scan" if name == "reference" else f"ours {name}"
            found[label] = functools.partial(function, implementation=name)
    if case.function in ASSOCIATIVE:
        found["associative_scan"] = ASSOCIATIVE[case.function]
    return found


def program(function: Callable[..., Any], arrays: tuple[Array, ...], which: str) -> Callable[[], Any]:
    """A call of one pass, compiled."""

    def both(cotangents: Any, *arrays: Array) -> tuple[Any, tuple[Array, ...]]:
        results, pull = jax.vjp(function, *arrays)
        return results, pull(cotangents)

    if which == "forward":
        forward = jax.jit(function).lower(*arrays).compile()
        return lambda: forward(*arrays)
    cotangents = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), jax.eval_shape(function, *arrays))
    compiled = jax.jit(both).lower(cotangents, *arrays).compile()
    return lambda: compiled(cotangents, *arrays)


def bench(case: Case, which: str, dtype: Any, repeats: int, sample_seconds: float) -> list[dict[str, Any]]:
    """Rows of one pass of one case; a side that cannot do it has the reason in place of times."""
    about = {"case": case.name, "pass": which}
    arrays, ready = case.arrays(dtype), {}
    rows: list[dict[str, Any]] = []
    for name, function in sides(case).items():
        try:
            call = program(function, arrays, which)
            jax.block_until_ready(call())
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            rows.append(dict(about, implementation=name, error=str(error).splitlines()[0][:200]))
        else:
            ready[name] = call
    for name, samples in interleaved(ready, repeats, sample_seconds).items():
        ms = 1e3 * statistics.median(samples)
        spread = 1e3 * (max(samples) - min(samples)) / ms
        rows.append(dict(about, implementation=name, ms=ms, spread=spread))
        print(f"{case.name:48} {which:16} {name:18} {ms:10.3f} ms, spread {spread:.2f}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """For each of our implementations how many times faster than each peer it is."""
    lines = ["", f"{'case':48} {'pass':16} {'ours':16} {'ms':>10}  times as fast as"]
    times = {(row["case"], row["pass"], row["implementation"]): row["ms"] for row in rows if "ms" in row}
    for (case, which, name), ms in times.items():
        if name in PEERS:
            continue
        ratios = [f"{times[case, which, peer] / ms:.2f} {peer}" for peer in PEERS if (case, which, peer) in times]
        lines.append(f"{case:48} {which:16} {name:16} {ms:10.3f}  {', '.join(ratios)}")
    return lines


def main() -> None:
    """Measure, keep, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--cases", default="", help="a regular expression that a case's name must contain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    given = parser.parse_args()
    platform, device = target()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    every = quick_cases() if given.quick else cases(platform)
    chosen = [case for case in every if re.search(given.cases, case.name)]
    print(f"{device}, jax {jax.__version__}, {jnp.dtype(dtype).name}; {timer()[0]}")
    rows: list[dict[str, Any]] = []
    for case in chosen:
        for which in PASSES:
            rows += bench(case, which, dtype, *((2, 0.002) if given.quick else (given.rounds, 0.05)))
            if given.json is not None:
                about = {"device": device, "jax": jax.__version__, "timer": timer()[0], "rows": rows}
                given.json.write_text(json.dumps(about, indent=1) + "\n")
    for row in rows:
        if "error" in row:
            print(f"{row['case']}, {row['pass']}, {row['implementation']}: {row['error']}")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
