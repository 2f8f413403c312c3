import json
import math

import pytest

from llmjax.config import ConfigError, validate
from llmjax.train.early_stopping import EarlyStopping, EarlyStoppingState
from tests.evidence import evidence


def stop_at(config, losses):
    """Index of the check that stops a scripted run (its length when none does) and the last state."""
    state = config.init()
    for step, loss in enumerate(losses):
        state = config.update(state, step, loss)
        if config.should_stop(state):
            return step, state
    return len(losses), state


@evidence("E58", oracle="scripted loss series", code="llmjax.train.early_stopping.EarlyStopping")
@pytest.mark.parametrize(
    ("mode", "losses", "expected"),
    [
        # the third increase, with patience 3
        ("rises", [3, 2, 2.1, 2.2, 2.3, 2.4], 4),
        ("best", [3, 2, 2.1, 2.2, 2.3, 2.4], 4),
        # a plateau is no increase, but no new best either
        ("rises", [3, 2, 2, 2, 2, 2, 2], 7),
        ("best", [3, 2, 2, 2, 2, 2, 2], 4),
        # a fall that stays above the best clears the strikes of `rises` only
        ("rises", [3, 2, 2.5, 2.6, 2.4, 2.5, 2.6], 7),
        ("best", [3, 2, 2.5, 2.6, 2.4, 2.5, 2.6], 4),
        ("best", [3, 2, 2.5, 2.6, 1.9, 2.5, 2.6, 1.8], 8),
        # NaN counts against going on and never becomes the best
        ("best", [3, math.nan, 2, math.nan, math.nan, math.inf], 5),
        ("rises", [3, math.nan, math.nan, math.nan], 3),
    ],
)
def test_scripted_series(evidence, mode, losses, expected):
    step, _ = stop_at(EarlyStopping(patience=3, mode=mode), losses)
    evidence.record(abs(step - expected), 0)


def test_improvements_within_min_delta_do_not_count():
    losses = [3.0, 2.9, 2.8, 2.7]
    assert stop_at(EarlyStopping(patience=2), losses)[0] == 4
    assert stop_at(EarlyStopping(patience=2, min_delta=0.5), losses)[0] == 2
    # measured from the best that counted, so slow progress adds up: 2.4 is more than 0.5 below 3.0
    step, state = stop_at(EarlyStopping(patience=3, min_delta=0.5), [3.0, 2.8, 2.6, 2.4])
    assert (step, state.best, state.best_step, state.strikes) == (4, 2.4, 3, 0)
    assert stop_at(EarlyStopping(patience=2, mode="rises", min_delta=0.3), [3.0, 3.2, 3.4, 3.6])[0] == 4


@pytest.mark.parametrize("mode", ["best", "rises"])
def test_the_best_is_remembered(mode):
    _, state = stop_at(EarlyStopping(patience=9, mode=mode), [3, 1.5, math.nan, 2, 1.7])
    assert (state.best, state.best_step, state.previous) == (1.5, 1, 1.7)


def test_state_survives_json():
    state = stop_at(EarlyStopping(), [3.0, 2.0, 2.5])[1]
    assert EarlyStoppingState(*json.loads(json.dumps(state))) == state


@pytest.mark.parametrize(("field", "value"), [("patience", 0), ("min_delta", -1.0)])
def test_bad_values(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value} is"):
        validate(EarlyStopping(**{field: value}))
