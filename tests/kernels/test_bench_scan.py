"""The benchmark of scans at tiny sizes: its sides compute the same thing, it runs, and its ratios are quotients."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import bench_scan


@pytest.mark.parametrize("case", list(bench_scan.quick_cases()), ids=lambda case: case.function)
def test_every_side_computes_the_same(case):
    """Output and last state in float32, relative to the largest entry: sums over 64 tokens in another order."""
    arrays = case.arrays(jnp.float32)
    found = {name: jax.jit(function)(*arrays) for name, function in bench_scan.sides(case).items()}
    expected = found.pop("lax.scan")
    assert "ours xla" in found
    for results in found.values():
        for mine, wanted in zip(results, expected, strict=True):
            assert mine.shape == wanted.shape
            assert np.abs(mine - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_quick_benchmark_runs(monkeypatch, tmp_path, capsys):
    """Times of every side for both passes in the file; the last line has their quotients."""
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--cases", "linear_recurrence", "--json", str(path)])
    bench_scan.main()
    rows = {(row["pass"], row["implementation"]): row["ms"] for row in json.loads(path.read_text())["rows"]}
    sides = ("ours xla", "lax.scan", "associative_scan")
    assert set(rows) == {(which, name) for which in bench_scan.PASSES for name in sides}
    last = capsys.readouterr().out.strip().splitlines()[-1]
    ours, sequential, prefix = (rows["forward+backward", name] for name in sides)
    assert last.endswith(f"{sequential / ours:.2f} lax.scan, {prefix / ours:.2f} associative_scan")


def test_a_side_that_cannot_do_it_has_its_reason(monkeypatch):
    """And the others their times."""

    def refuses(*arrays):
        raise NotImplementedError("has no such thing")

    case = bench_scan.Case("linear_recurrence", 1, 8, 4, 1)
    monkeypatch.setattr(bench_scan, "sides", lambda _: {"refuses": refuses, "plain": bench_scan.associative_recurrence})
    refused, timed = bench_scan.bench(case, "forward", jnp.float32, 1, 0.001)
    assert refused["error"] == "has no such thing"
    assert timed["ms"] > 0
