"""The benchmark and the tuner at tiny sizes: they run, count what they say, go on where they were cut off."""

import json
import sys

import numpy as np
import pytest

from scripts import bench_attention, tune
from scripts.bench_attention import Case


def visible(case):
    """The pairs that see each other, from the definition."""
    query, key = np.arange(case.length)[:, None], np.arange(case.length)
    seen = np.ones((case.length, case.length), bool)
    if case.causal:
        seen &= query >= key
    if case.window is not None:
        seen &= query - key < case.window
    each = case.length // case.documents
    return np.sum(seen & (query // each == key // each))


@pytest.mark.parametrize(
    "case",
    [
        Case("full", 2, 256, 4, 4, 64, 64, False),
        Case("causal", 2, 256, 4, 2, 64, 64, True),
        Case("packed", 1, 256, 4, 4, 192, 128, True, documents=8),
        Case("window", 1, 256, 4, 4, 64, 64, True, window=32),
    ],
)
def test_flops_are_two_for_each_product_of_a_visible_pair(case):
    """Half of the diagonal of each triangle, and nothing else, is left out by the convention T^2 / 2."""
    diagonal = (case.window or case.length) if case.causal else 0
    flops = 2 * case.batch * case.heads * (visible(case) - diagonal / 2) * (case.head_dim + case.value_dim)
    assert case.flops("forward") == pytest.approx(flops, rel=1e-12)
    assert case.flops("backward") == 2.5 * case.flops("forward")


def run_quick(monkeypatch, path, cases):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--cases", cases, "--json", str(path)])
    bench_attention.main()


def test_quick_benchmark_runs_and_goes_on(monkeypatch, tmp_path, capsys):
    """Rows of every implementation with times or a reason; a second run measures nothing again."""
    path = tmp_path / "results.json"
    run_quick(monkeypatch, path, "packed|decode")
    rows = {(row["case"], row["direction"], row["implementation"]): row for row in json.loads(path.read_text())["rows"]}
    for direction in ("forward", "backward"):
        for name in ("ours xla", "ours reference", "jax.nn xla"):
            assert rows["packed 8 D16 T64", direction, name]["ms"] > 0
    decode = rows["decode 2 x 64", "forward", "ours xla"]
    # Keys and values of 2 sequences, 64 tokens, 2 kv heads of 16 numbers, 2 bytes each.
    assert decode["GB/s"] * 1e9 * decode["ms"] / 1e3 == pytest.approx(2 * 2 * 64 * 2 * 16 * 2)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "of copy bandwidth" in last
    before = path.read_text()
    monkeypatch.setattr(bench_attention, "interleaved", lambda calls, *_: pytest.fail("again") if calls else {})
    run_quick(monkeypatch, path, "packed|decode")
    assert path.read_text() == before


def test_what_did_not_return_is_not_tried_again(monkeypatch, tmp_path):
    """A call that raises leaves its reason; one that took the process down leaves the mark it was started with."""
    path = tmp_path / "results.json"
    case = Case("one", 1, 64, 2, 2, 16, 16, True)

    def raises():
        raise NotImplementedError("has no such thing")

    def dies():
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_attention, "calls", lambda *_: {"raises": raises, "dies": dies})
    results = bench_attention.Results(path)
    with pytest.raises(KeyboardInterrupt):
        bench_attention.bench(case, "forward", results, 1, 0.001)
    again = bench_attention.Results(path)
    assert [row["error"] for row in again.rows.values()] == [
        "NotImplementedError: has no such thing",
        bench_attention.UNFINISHED,
    ]
    bench_attention.bench(case, "forward", again, 1, 0.001)


COSTS = {("forward", 1): 5.0, ("forward", 2): 3.0, ("backward", 10): 8.0, ("backward", 20): 9.0}


def task(direction, block):
    fields = {"block_q": 0, "block_k": 0, "compute": 0, "backward_block_q": 0}
    fields["block_q" if direction == "forward" else "backward_block_q"] = block
    problem = dict(length=1024, head_dim=128, value_dim=128, causal=True)
    return dict(kernel="tpu", direction=direction, problem=problem, config=fields)


def cost(one):
    block = one["config"]["block_q"] or one["config"]["backward_block_q"]
    if block == 3:
        raise ValueError("too large")
    return COSTS[one["direction"], block], "cycles"


def test_tuning_joins_the_best_passes_and_goes_on(monkeypatch, tmp_path):
    """The cheapest forward and backward fields make one entry; failures count for nothing; nothing is done twice."""
    log = tmp_path / "log.jsonl"
    todo = [*(task("forward", block) for block in (1, 3, 2)), *(task("backward", block) for block in (20, 10))]
    results = tune.run(log, todo[:4], cost, minutes=1)
    assert tune.best(todo, results, "estimate x") == [], "one task is still to come"
    (entry,) = tune.best(todo, tune.run(log, todo, cost, minutes=1), "estimate x")
    assert entry["config"] == {"block_q": 2, "block_k": 0, "compute": 0, "backward_block_q": 10}
    assert (entry["cost"], entry["unit"], entry["source"]) == (11.0, "cycles", "estimate x")
    asked = []
    tune.run(log, todo, lambda one: asked.append(one) or (1.0, "cycles"), minutes=1)
    assert asked == []
    monkeypatch.setattr(tune, "fingerprint", lambda kernel: "other code")
    assert tune.run(log, todo, cost, minutes=0) == [], "what was found for other code does not count"


def test_a_task_that_costs_nothing_to_say_is_not_logged(tmp_path):
    """Checking registers logs failures alone, so that a measuring run does the rest."""

    def check(one):
        if one["config"]["block_q"] == 3:
            raise ValueError("spills 8 bytes a thread")

    log = tmp_path / "log.jsonl"
    results = tune.run(log, [task("forward", 1), task("forward", 3)], check, minutes=1)
    assert [(r["config"]["block_q"], r["cost"], r["error"]) for r in results] == [(3, None, "spills 8 bytes a thread")]


def test_tuned_entries_take_the_place_of_older_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "CONFIGS", tmp_path)
    path = tmp_path / "v5p.json"
    path.write_text('{"chip": "v5p", "entries": []}')
    place = dict(
        kernel="k", dtype="bfloat16", head_dim=64, value_dim=64, causal=True, query_length=1024, key_length=1024
    )
    tune.write("v5p", [place | {"cost": 1}])
    tune.write("v5p", [place | {"cost": 2}, place | {"head_dim": 32, "cost": 3}])
    table = json.loads(path.read_text())
    assert table["chip"] == "v5p"
    assert [(entry["head_dim"], entry["cost"]) for entry in table["entries"]] == [(32, 3), (64, 2)]
