import math

import numpy as np
import optax
import pytest

from llmjax.config import ConfigError, from_dict, subclasses, to_dict, validate
from llmjax.train.schedules import WSD, Constant, Cosine, InverseSqrt, Linear, Schedule
from tests.evidence import evidence

PEAK, WARMUP, TOTAL = 3e-4, 100, 1000
STEPS = (0, 1, 50, 99, 100, 101, 550, 799, 800, 801, 999, 1000, 1500)
# optax computes in float32: seven digits of the peak
TOLERANCE = 1e-6 * PEAK


def error(schedule, oracle, steps=STEPS):
    return max(abs(schedule.value(step, TOTAL) - float(oracle(step))) for step in steps)


@evidence("E23", oracle="optax.warmup_cosine_decay_schedule", code="llmjax.train.schedules.Cosine")
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_optax(evidence, floor):
    oracle = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, TOTAL, end_value=floor * PEAK)
    evidence.record(error(Cosine(PEAK, WARMUP, floor=floor), oracle), TOLERANCE)


@pytest.mark.parametrize("end", [0.8, 800])
def test_cosine_ends_where_it_is_told_to(end):
    oracle = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, 800, end_value=0.1 * PEAK)
    assert error(Cosine(PEAK, WARMUP, end=end), oracle) <= TOLERANCE


@evidence("E23", oracle="published values at 0, 50, 100, 550, 1000 of 1000 steps", code="llmjax.train.schedules.Cosine")
def test_cosine_values(evidence):
    schedule = Cosine(3e-5, 100, floor=1e-6 / 3e-5)
    values = [schedule.value(step, 1000) for step in (0, 50, 100, 550, 1000, 2000)]
    evidence.record(np.abs(np.subtract(values, [0, 1.5e-5, 3e-5, 1.55e-5, 1e-6, 1e-6])).max(), 1e-18)


@evidence("E24", oracle="optax.linear_schedule joined to a warmup", code="llmjax.train.schedules.Linear")
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_linear_is_optax(evidence, floor):
    parts = [optax.linear_schedule(0, PEAK, WARMUP), optax.linear_schedule(PEAK, floor * PEAK, TOTAL - WARMUP)]
    evidence.record(error(Linear(PEAK, WARMUP, floor=floor), optax.join_schedules(parts, [WARMUP])), TOLERANCE)


@evidence("E24", oracle="optax.warmup_constant_schedule", code="llmjax.train.schedules.Constant")
def test_constant_is_optax(evidence):
    evidence.record(error(Constant(PEAK, WARMUP), optax.warmup_constant_schedule(0, PEAK, WARMUP)), TOLERANCE)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_wsd_is_three_optax_schedules(shape):
    decay = 200
    end = {
        "linear": optax.linear_schedule(PEAK, 0.1 * PEAK, decay),
        "cosine": optax.cosine_decay_schedule(PEAK, decay, alpha=0.1),
    }[shape]
    parts = [optax.linear_schedule(0, PEAK, WARMUP), optax.constant_schedule(PEAK), end]
    oracle = optax.join_schedules(parts, [WARMUP, TOTAL - decay])
    assert error(WSD(PEAK, WARMUP, decay=0.2, shape=shape, floor=0.1), oracle) <= TOLERANCE


def test_wsd_square_root():
    schedule = WSD(PEAK, WARMUP, decay=0.2, shape="sqrt")
    for step, expected in ((800, 1.0), (850, 0.5), (918, 1 - math.sqrt(118 / 200)), (1000, 0.0)):
        assert schedule.value(step, TOTAL) == pytest.approx(PEAK * expected, abs=1e-18)


def test_wsd_of_the_whole_run_starts_where_the_warmup_ends():
    whole, line = WSD(PEAK, WARMUP, decay=1.0, shape="linear"), Linear(PEAK, WARMUP)
    assert error(whole, lambda step: line.value(step, TOTAL)) == 0


def test_inverse_sqrt_is_the_transformer_schedule():
    width, warmup = 512, 400

    def paper(t):
        return width**-0.5 * min(t**-0.5, t * warmup**-1.5)

    schedule = InverseSqrt(paper(warmup), warmup)
    for step in (1, 100, 399, 400, 401, 1600, 10**6):
        assert schedule.value(step, TOTAL) == pytest.approx(paper(step), rel=1e-12)
    assert InverseSqrt(1.0, 0).value(0, TOTAL) == InverseSqrt(1.0, 0).value(1, TOTAL) == 1.0


@evidence("E24", oracle="the same warmup given in steps", code="llmjax.train.schedules.Schedule.warmup_steps")
@pytest.mark.parametrize("kind", subclasses(Schedule).values(), ids=lambda kind: kind.__name__)
def test_warmup_by_fraction_of_updates(evidence, kind):
    # 100 000 rows in batches of 16 times 4 micro-batches: 1562 updates, of which 5 % are 78
    total = 100_000 // (16 * 4)
    assert kind(PEAK, 0.05).warmup_steps(total) == 78
    steps = range(0, total + 1, 13)
    evidence.record(max(abs(kind(PEAK, 0.05).value(s, total) - kind(PEAK, 78).value(s, total)) for s in steps), 0.0)


@pytest.mark.parametrize("kind", subclasses(Schedule).values(), ids=lambda kind: kind.__name__)
def test_every_schedule_is_continuous_at_its_peak_and_never_above_it(kind):
    schedule = kind(learning_rate=PEAK, warmup=WARMUP)
    values = [schedule.value(step, TOTAL) for step in range(TOTAL + 1)]
    assert values[0] == 0
    assert values[WARMUP] == max(values) == PEAK
    assert min(values) >= 0
    assert schedule.value(3, 3) <= PEAK  # a run shorter than its warmup never leaves it
    validate(schedule)
    assert from_dict(to_dict(schedule)) == schedule


def test_an_int_is_steps_and_a_float_a_fraction():
    assert Constant(1.0, 1).value(0, 10) == 0
    with pytest.raises(ConfigError, match=r"warmup=1\.0 is a float and so a fraction"):
        validate(Constant(1.0, 1.0))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Constant(0.0), "learning_rate=0.0 is not positive"),
        (Constant(math.nan), "learning_rate=nan is not positive"),
        (Linear(warmup=-1), "warmup=-1 is negative"),
        (Linear(floor=1.5), r"floor=1.5 is not in \[0, 1\]"),
        (Cosine(floor=-0.1), "floor=-0.1"),
        (WSD(decay=0.0), r"decay=0.0 is not in \(0, 1\]"),
        (WSD(floor=2.0), "floor=2.0"),
    ],
)
def test_bad_values(schedule, message):
    with pytest.raises(ConfigError, match=message):
        validate(schedule)
