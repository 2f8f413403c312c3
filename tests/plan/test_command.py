"""`llmjax plan` from end to end, on this machine's compiler, and what it says to wrong requests."""

import importlib.util
import json
from pathlib import Path

import pytest

from llmjax.cli import main
from llmjax.config import InputError, with_
from llmjax.experiment import load_experiment
from llmjax.plan import process, search, target
from llmjax.plan.advice import advice
from llmjax.plan.program import needed_bytes

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "experiments" / "tiny.py")


def plan(capsys, *words):
    code = main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_for_eight_cpus(capsys):
    """The keys that scripts read; parameters a device are the model's over fsdp; a CPU has no roofline."""
    mesh = ["--mesh.data=2", "--mesh.fsdp=4", "--data.batch_size=8", "--model.layers=1", "--data.length=64"]
    code, out, _ = plan(capsys, TINY, "--target=cpu:8", "--json", *mesh)
    assert code == 0
    assert out.startswith("cpu:8, data=2 x fsdp=4 (8 devices): fits")
    found = json.loads(out.splitlines()[-1])
    assert found["fits"]
    assert found["hbm_bytes_per_chip"] < found["hbm_limit_bytes"]
    assert found["step_seconds"] is None
    assert found["mfu"] is None
    assert found["compile_seconds"] > 0
    whole = 4 * found["num_params"]
    assert whole / 4 <= found["memory"]["parameters"] < 1.05 * whole / 4
    assert found["memory"]["total"] == found["hbm_bytes_per_chip"]
    assert {row["axis"] for row in found["collectives"]} >= {"fsdp", "data"}
    assert all(row["count"] and row["bytes"] for row in found["collectives"])
    # What is computed: the model's FLOPs (all causal pairs are computed on a CPU, few here), split over the devices.
    assert found["executed_flops"] == pytest.approx(found["model_flops_per_step"] / 8, rel=0.15)
    assert found["loops_counted_once"] == 0


WRONG = {
    "v5p": "is not of the form chip:AxBxC",
    "v5p:4x4xtwo": "is not of the form chip:AxBxC",
    "v5pp:4x4x4": "did you mean v5p",
    "cpu:2x4": "use cpu:8",
    "h100:1x1x8": "no description of h100 for its compiler: GPUs that have one are h200",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_targets_say_what_would_be_right(text, capsys):
    code, _, error = plan(capsys, TINY, f"--target={text}")
    assert code == 2
    assert WRONG[text] in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("text", "extra"), [("v5p:4x4x4", "llmjax[tpu]"), ("h200:1x1x8", "llmjax[cuda]")])
def test_an_absent_compiler_says_which_extra_brings_it(text, extra, capsys, monkeypatch):
    found = importlib.util.find_spec
    missing = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    code, _, error = plan(capsys, TINY, f"--target={text}")
    assert code == 2
    assert f"install {extra}" in error


def test_wrong_experiments_and_meshes_are_told_in_one_line(capsys):
    """From the subprocess, as from any other verb."""
    code, _, error = plan(capsys, TINY, "--target=cpu:2", "--mesh.fsdp=4")
    assert code == 2
    assert "needs 4 devices, there are 2" in error
    assert len(error.splitlines()) == 1


def test_a_compiler_that_dies_is_a_failed_run(capsys, monkeypatch):
    monkeypatch.setattr(process, "environment", lambda target: {"PYTHONHOME": "nowhere"})
    code, _, error = plan(capsys, TINY, "--target=cpu:2")
    assert code == 1
    assert "ended with code" in error


def test_the_nearest_slices():
    """By likeness and by number of chips."""
    v5p = target.Target("v5p:3x3x3", target.CHIPS["v5p"], (3, 3, 3))
    assert "v5p:2x4x4" in str(target.unknown_topology(v5p))
    v6e = target.Target("v6e:15x15", target.CHIPS["v6e"], (15, 15))
    assert "v6e:16x16" in str(target.unknown_topology(v6e))


REFUSALS = {
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.44G of 15.75G hbm. Exceeded": 19.44 * 2**30,
    "the total memory required for HLO temporaries (480.00G) exceeds available HBM (15.25G).": 480 * 2**30,
    "something else": 0,
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_a_compiler_would_have_needed(message):
    """Messages of libtpu 0.0.42."""
    assert needed_bytes(message) == int(REFUSALS[message])


def test_advice_follows_what_takes_the_memory():
    """States too large: split them. Else: keep less, or do it in turns; what fits needs nothing."""
    experiment = load_experiment(TINY)
    memory = {"parameters": 4, "optimizer_state": 8, "ema": 0, "gradients": 4}
    mesh = {"data": 1, "fsdp": 2, "context": 1, "tensor": 1}
    found = {"fits": False, "memory": memory, "hbm_limit_bytes": 20, "mesh": mesh, "terms": None}
    found |= {"devices": 2, "devices_of_target": 2}
    first, *rest = advice(experiment, found)
    assert first.startswith("--mesh.fsdp=4")
    assert any(line.startswith("--train.accumulate=2") for line in rest)
    assert not advice(experiment, found | {"fits": True})
    assert "2 of 4 devices" in advice(experiment, found | {"fits": True, "devices_of_target": 4})[0]
    assert not any("fsdp" in line for line in advice(experiment, found | {"hbm_limit_bytes": 100}))
    for remat, less in {"none": "dots", "dots": "attention", "attention": "full", "full": None}.items():
        lines = advice(with_(experiment, "model.remat", remat), found)
        assert [line.split(":")[0] for line in lines if "remat" in line] == ([f"--model.remat={less}"] if less else [])


def test_a_search_begins_with_the_least_change():
    """As it is, then less kept, then meshes of the same number of chips, then microbatches."""
    found = list(search.variants(load_experiment(TINY, ["--data.batch_size=8"]), 8))
    assert found[0] == []
    assert found[1:4] == [["--model.remat=dots"], ["--model.remat=attention"], ["--model.remat=full"]]
    assert ["--model.remat=full", "--mesh.data=1", "--mesh.fsdp=4", "--mesh.tensor=2"] in found
    assert found[-1][-1] == "--train.accumulate=8"


def test_a_search_stops_at_the_first_that_fits(monkeypatch):
    """The stand-in compiler fits from remat=attention on; a variant that is refused is told and passed over."""
    tried, told = [], []

    def plan_of(experiment, target, overrides):
        tried.append(overrides)
        if "--model.remat=dots" in overrides:
            raise InputError("refused")
        return {"fits": "--model.remat=attention" in overrides, "hbm_bytes_per_chip": 3, "hbm_limit_bytes": 2}

    monkeypatch.setattr(search, "plan_of", plan_of)
    found = search.first_that_fits(TINY, "cpu:8", ["--train.steps=5"], told.append)
    dots, attention = "--model.remat=dots", "--model.remat=attention"
    assert found["overrides"] == [attention]
    assert tried == [["--train.steps=5", *more] for more in ([], [dots], [attention])]
    assert told == ["as it is: 150% of a chip", f"{dots}: refused", f"{attention}: 150% of a chip"]
