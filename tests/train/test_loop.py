"""The loop on a tiny run: what it logs, when it evaluates, saves and stops, and what it refuses."""

import dataclasses
import json
import math
import os
import shutil
import signal
import threading

import chex
import numpy as np
import pytest

from llmjax.config import ConfigError, InputError
from llmjax.nn.initializers import GPT2Init
from llmjax.train import checkpoint
from llmjax.train.early_stopping import EarlyStopping
from llmjax.train.ema import Ema
from llmjax.train.load import load_params
from llmjax.train.log import read_metrics
from llmjax.train.loop import fit
from llmjax.train.optimizers import AdamW, ScheduleFree
from llmjax.train.prefetch import Prefetch
from llmjax.train.process import locked
from llmjax.train.schedules import Constant
from llmjax.train.state import plan
from tests.evidence import evidence
from tests.train.test_step import plain_loss
from tests.train.tiny import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: experiment, directory, result, events."""
    folder, events = tmp_path_factory.mktemp("run"), []
    experiment = tiny()
    return experiment, folder, fit(experiment, folder, report=events.append), events


def held_out_loss(experiment, params):
    """The held-out loss of a run's evaluation, by optax on the logits."""
    batches = list(experiment.data.build(experiment.seed).eval_batches(experiment.train.eval_batches))
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return float(plain_loss(experiment, params, whole))


@evidence("E14", oracle="ln V, the loss of a uniform guess", code="llmjax.train.loop.fit")
def test_the_loss_starts_at_that_of_a_uniform_guess_and_falls(evidence, tmp_path):
    experiment = tiny({"model.initializer": GPT2Init(std=1e-4)}, log_every=1, steps=30, eval_every=0)
    fit(experiment, tmp_path)
    losses = [line["nll"] for line in read_metrics(tmp_path)]
    assert losses[-1] < losses[0] - 0.5
    evidence.record(abs(losses[0] - math.log(257)), 0.01)


def test_lines_obey_the_laws_of_their_quantities(finished):
    experiment, folder, result, _ = finished
    lines = read_metrics(folder)
    logs = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logs] == [3, 6, 9, 12]
    rows = experiment.data.batch_size * experiment.data.length
    for line in logs:
        assert line["tokens"] == rows * line["step"]
        assert line["perplexity"] == math.exp(line["nll"])
        assert line["learning_rate"] == experiment.optimizer.schedule.value(line["step"] - 1, 12)
        assert 0 <= line["data_wait_fraction"] <= 1
        assert (line["skipped"], line["mfu"]) == (0, None)
        assert (
            min(line[name] for name in ("grad_norm", "update_norm", "param_norm", "tokens_per_second", "seconds")) > 0
        )
    evals = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evals] == [6, 12]
    assert all(line["val_perplexity"] == math.exp(line["val_nll"]) for line in evals)
    assert result["val_bits_per_byte"] == evals[-1]["val_bits_per_byte"]
    assert (result["steps"], result["stopped"], result["traces"], result["recompiles"]) == (12, "done", 1, 0)
    assert min(result[name] for name in ("tokens_per_second", "train_seconds", "compile_seconds")) > 0
    assert json.loads(json.dumps(result)) == result


def test_reports_are_the_lines(finished):
    _, folder, result, events = finished
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["compile", "start"]
    assert kinds[-1] == "stop"
    written = [
        {k: v for k, v in event.items() if k != "event"} for event in events if event["event"] in ("log", "eval")
    ]
    assert written == read_metrics(folder)
    assert {k: v for k, v in events[-1].items() if k != "event"} == result


def test_the_held_out_loss_is_that_of_the_saved_parameters(finished):
    experiment, folder, result, _ = finished
    params, step = load_params(experiment, folder, pytest.fail)
    assert step == 12
    assert math.isclose(result["val_loss"], held_out_loss(experiment, params), rel_tol=1e-5)


def test_a_finished_run_is_not_run_again(finished):
    experiment, folder, result, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    again = fit(experiment, folder)
    assert (folder / "metrics.jsonl").read_bytes() == before
    timing = ("tokens_per_second", "compile_seconds")
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in result.items() if k not in timing}


def test_more_steps_go_on_where_it_ended(finished, tmp_path):
    experiment, folder, *_ = finished
    events = []
    longer = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=15))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert fit(longer, tmp_path, report=events.append)["steps"] == 15
    assert {"event": "resume", "step": 12} in events
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == [3, 6, 9, 12, 15]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "schedule_free"])
def test_averages_are_what_is_evaluated_and_loaded(tmp_path, kind):
    experiment = tiny(ema=Ema(decay=0.9)) if kind == "ema" else dataclasses.replace(tiny(), optimizer=ScheduleFree())
    result = fit(experiment, tmp_path)
    params, _ = load_params(experiment, tmp_path, pytest.fail)
    trained = checkpoint.newest(tmp_path, pytest.fail).params(_abstract(experiment))
    assert math.isclose(result["val_loss"], held_out_loss(experiment, params), rel_tol=1e-5)
    assert abs(result["val_loss"] - held_out_loss(experiment, trained)) > 1e-3


def _abstract(experiment):
    return plan(experiment.model, experiment.optimizer, experiment.train, experiment.mesh.build()).abstract.params


@evidence("E58", oracle="a schedule that cannot improve", code="llmjax.train.loop.fit")
def test_early_stopping_ends_the_run_and_stays_stopped(evidence, tmp_path):
    # A vanishing learning rate: after the first check nothing improves by 0.1, so two more end it.
    optimizer = AdamW(schedule=Constant(learning_rate=1e-9))
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    experiment = dataclasses.replace(tiny(steps=50, eval_every=2, early_stopping=stopping), optimizer=optimizer)
    result = fit(experiment, tmp_path)
    assert result["stopped"] == "early_stopping"
    assert checkpoint.steps(tmp_path)[-1] == 6
    assert fit(experiment, tmp_path)["stopped"] == "early_stopping"
    evidence.record(abs(result["steps"] - 6), 0)


@pytest.mark.slow
def test_the_best_checkpoint_is_the_one_of_lowest_loss(tmp_path):
    # Learning first, then a rate so high that the loss rises.
    class Rising(Constant):
        def value(self, step, total_steps):
            return 3e-3 if step < 6 else 1.0

    experiment = dataclasses.replace(
        tiny(eval_every=2, checkpoint_every=2, keep_last=1), optimizer=AdamW(schedule=Rising())
    )
    fit(experiment, tmp_path)
    losses = {line["step"]: line["val_loss"] for line in read_metrics(tmp_path) if "val_loss" in line}
    lowest = min(losses, key=losses.get)
    assert lowest < 12
    assert checkpoint.steps(tmp_path) == [lowest, 12]
    params, step = load_params(experiment, tmp_path, pytest.fail, "best")
    assert step == lowest
    assert math.isclose(losses[lowest], held_out_loss(experiment, params), rel_tol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_ends(tmp_path, number):
    events = []

    def report(event):
        events.append(event)
        if event.get("event") == "log" and event["step"] == 6:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a second one, while the first is being served

    before = signal.getsignal(number)
    result = fit(tiny(eval_every=0, checkpoint_every=0), tmp_path, report=report)
    assert signal.getsignal(number) is before
    assert (result["stopped"], result["steps"]) == ("signal", 6)
    assert checkpoint.steps(tmp_path) == [6]
    assert fit(tiny(eval_every=0, checkpoint_every=0), tmp_path)["stopped"] == "done"


def test_fit_runs_outside_of_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(tiny(steps=2, eval_every=0), tmp_path)))
    thread.start()
    thread.join()
    assert results[0]["stopped"] == "done"


def test_a_run_directory_is_for_one_process(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="in use by another process"):
        fit(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.accumulate": 3}, r"train\.accumulate=3 does not divide data\.batch_size=8: use one of 1, 2, 4, 8"),
        ({"model.vocab": 200}, r"model\.vocab=200 is less than the tokenizer's 257 ids: use at least 257"),
        ({"optimizer.no_decay": "nothing"}, r"optimizer\.no_decay"),
        ({"mesh.data": 64}, r"mesh data=64 needs 64 devices"),
    ],
)
def test_what_does_not_fit_together_is_one_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit(tiny(changes), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.devices(8)
def test_rows_that_cannot_be_split_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.batch_size=8 in 2 microbatches cannot be split over the 8 parts"):
        fit(tiny({"mesh.data": 8}, accumulate=2), tmp_path)


def test_other_data_or_another_shape_is_refused_and_leaves_the_run_alone(finished, tmp_path):
    _, folder, *_ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = sorted(str(path) for path in tmp_path.rglob("*")), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="was trained on other data"):
        fit(tiny({"data.length": 8}), tmp_path)
    with pytest.raises(InputError, match=r"parameter \S+ is float32"):
        fit(tiny({"model.d_model": 64}), tmp_path)
    assert before == (sorted(str(path) for path in tmp_path.rglob("*")), (tmp_path / "metrics.jsonl").read_bytes())


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(finished, tmp_path):
    experiment, folder, *_ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (checkpoint.place(tmp_path, 12) / "meta.json").write_text("{}")
    events = []
    result = fit(experiment, tmp_path, report=events.append)
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert len(warnings) == 1
    assert "00000012 is damaged" in warnings[0]
    assert {"event": "resume", "step": 8} in events
    assert result["steps"] == 12
    params, step = load_params(experiment, tmp_path, pytest.fail)
    assert step == 12
    chex.assert_trees_all_equal(params, load_params(experiment, folder, pytest.fail)[0])


@pytest.mark.matrix
@pytest.mark.devices(8)
def test_eight_devices_train_like_one(tmp_path):
    losses = []
    for name, mesh in (("one", 1), ("eight", 8)):
        fit(tiny({"mesh.fsdp": mesh}, log_every=1, steps=4), tmp_path / name)
        losses.append([line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_prefetching_keeps_the_order_and_passes_errors_on():
    def batch(step):
        if step == 5:
            raise InputError("line 5 is bad")
        return {"tokens": np.full((2, 3), step)}

    with Prefetch(batch, 2, 9) as batches:
        assert [int(batches.take()["tokens"][0, 0]) for _ in range(3)] == [2, 3, 4]
        with pytest.raises(InputError, match="line 5 is bad"):
            batches.take()
    threads = threading.active_count()
    with Prefetch(lambda step: batch(0), 0, 10**9):
        pass
    assert threading.active_count() == threads
