"""Batches that grow: how many rows when, the same rows in the same order, and the update of their mean gradient."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llmjax.config import ConfigError, validate
from llmjax.train.loop import fit
from llmjax.train.ramp import BatchRamp, Ramped
from llmjax.train.state import plan
from llmjax.train.step import Step, apply_of
from tests.evidence import evidence
from tests.train.tiny import tiny

RAMP = BatchRamp(start=2, over=40)
ROWS, MICROBATCHES = 8, 4


@pytest.fixture(scope="module")
def experiment():
    return tiny(accumulate=MICROBATCHES, ramp=RAMP, steps=18)


@pytest.fixture(scope="module")
def batches(experiment):
    """The rows as they come, and the same with the ramp."""
    plain = experiment.data.build(0)
    return plain, Ramped(plain, RAMP, experiment.data.empty(ROWS), MICROBATCHES)


@evidence("E25", oracle="the solution of rows' = start + (full - start) rows / over", code="llmjax.train.ramp")
def test_updates_of_gpt3s_ramp(evidence):
    """Growth that is linear in what was read is exponential in updates: over / (B - b) ln(B / b) of them (2 percent).

    Rounding down to a row makes them more; at the ramp's end `over` rows are read, but for less than a batch.
    """
    ramp, full = BatchRamp(start=16, over=1_953_125), 1536
    counts = ramp.microbatches(full, full)
    assert counts[0] == 16
    assert counts[-1] == full
    assert (np.diff(counts) >= 0).all()
    assert ramp.over <= counts[:-1].sum() < ramp.over + full
    expected = ramp.over / (full - 16) * math.log(full / 16)
    evidence.record(abs(len(counts) - 1 - expected) / expected, 0.02)
    for wanted in (1, 17, ramp.over, ramp.over + 5000, 146_484_375):
        steps = ramp.steps(full, full, wanted)
        read = [
            counts[: min(n, len(counts) - 1)].sum() + max(n - len(counts) + 1, 0) * full for n in (steps - 1, steps)
        ]
        assert read[0] < wanted <= read[1]


def test_no_row_is_lost_or_read_twice(batches):
    plain, ramped = batches
    rows = [plain.batch(step) for step in range(12)]
    expected = np.concatenate([batch["tokens"] for batch in rows])
    counts = [*RAMP.microbatches(ROWS, MICROBATCHES), MICROBATCHES, MICROBATCHES]
    assert counts[0] == 1
    assert len(set(counts)) == MICROBATCHES
    read = 0
    for step, count in enumerate(counts):
        batch = ramped.batch(step)
        filled = np.arange(ROWS) % MICROBATCHES < count
        np.testing.assert_array_equal(batch["tokens"][filled], expected[read : read + filled.sum()])
        assert not batch["loss_mask"][~filled].any()
        assert (batch["positions"][~filled] == -1).all()
        for part in (slice(0, 4), slice(3, 8), slice(2, 3)):
            held = ramped.batch(step, part)
            for name, array in batch.items():
                np.testing.assert_array_equal(held[name], array[part])
        read += filled.sum()


@evidence("E25", oracle="the gradient of the rows alone in one batch", code="llmjax.train.ramp")
@pytest.mark.parametrize("step", [0, 8])
def test_an_update_is_that_of_its_rows(experiment, batches, evidence, step):
    """The mean over the rows that are due, whatever stands in the others: 1e-6, sums reordered."""
    laid = plan(experiment.model, experiment.optimizer, experiment.train, experiment.mesh.build())
    state, batch = laid.init(0), batches[1].batch(step)
    count = RAMP.microbatches(ROWS, MICROBATCHES)[step]
    assert 1 <= count < MICROBATCHES

    def gradients(train, batch):
        made = Step(apply_of(experiment.model.build()), experiment.objective, laid.optimizer, train)
        return jax.jit(lambda batch, step: made.gradients(state, batch, jax.random.key(0), step))(batch, np.int32(step))

    due = np.arange(ROWS) % MICROBATCHES < count
    alone, _ = gradients(
        dataclasses.replace(experiment.train, ramp=None, accumulate=1), {n: x[due] for n, x in batch.items()}
    )
    rubbish = {name: np.where(due[:, None], x, x[:1] if name != "loss_mask" else 1) for name, x in batch.items()}
    ramped, metrics = gradients(experiment.train, rubbish)
    assert metrics["loss"].count == batch["loss_mask"].sum()
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(alone))
    worst = max(
        float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(ramped), strict=True)
    )
    evidence.record(worst / scale, 1e-6)


def test_a_run_counts_its_tokens_and_compiles_once(experiment, tmp_path):
    result = fit(experiment, tmp_path)
    counts = RAMP.microbatches(ROWS, MICROBATCHES)
    rows = 2 * sum(int(counts[min(step, len(counts) - 1)]) for step in range(18))
    assert len(counts) < 18
    assert result["tokens"] == rows * experiment.data.length
    assert result["recompiles"] == 0


def test_a_ramp_needs_microbatches(experiment):
    with pytest.raises(ConfigError, match=r"train\.ramp grows batches by microbatches: set train.accumulate"):
        validate(dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, accumulate=1)))
    with pytest.raises(ConfigError, match=r"train\.ramp\.over=0 is below 1"):
        validate(tiny(accumulate=2, ramp=BatchRamp(start=2, over=0)))
    with pytest.raises(ConfigError, match=r"train\.ramp\.start=9 exceeds data.batch_size=8"):
        validate(tiny(accumulate=2, ramp=BatchRamp(start=9)))
