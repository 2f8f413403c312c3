"""Pictures of shapes: rows by address, captions, classes, and what the pictures show."""

import dataclasses

import numpy as np
import pytest

from llmjax.config import ConfigError, validate
from llmjax.data.shapes import COLOURS, FORMS, PLACES, Shapes, picture

pytestmark = pytest.mark.mixers

DATA = Shapes(batch_size=8, eval_rows=16, side=24)


def test_a_batch_is_a_function_of_seed_and_step():
    """Rows alone are those of the whole batch; other steps, seeds and the held-out rows are others."""
    batches = DATA.build(3)
    whole = batches.batch(5)
    part = DATA.build(3).batch(5, slice(2, 4))
    for name, array in whole.items():
        np.testing.assert_array_equal(array[2:4], part[name])
    others = [batches.batch(6), DATA.build(4).batch(5), next(batches.eval_batches())]
    assert all((other["images"] != whole["images"]).any() for other in others)
    assert len(list(batches.eval_batches())) == 2
    assert len(list(batches.eval_batches(1))) == 1


def test_captions_say_what_is_seen():
    """The colour, the form and the quarter in words; the label is the form; the loss counts the four last words."""
    batch, codec = DATA.build(0).batch(0), DATA.build(0).tokenizer
    assert batch["images"].shape == (8, 24, 24, 3)
    for row in range(8):
        _, colour, form, place, _ = codec.decode(batch["tokens"][row]).split()
        assert form == FORMS[batch["labels"][row, 0]]
        quarters = batch["images"][row].reshape(2, 12, 2, 12, 3).mean(axis=(1, 3))
        brightest = np.argmax(quarters.sum(axis=-1))
        assert place == PLACES[brightest]
        shown = quarters.reshape(4, 3)[brightest]
        assert colour == named(shown)
        assert batch["loss_mask"][row].tolist() == [1, 1, 1, 1, 0]
        assert codec.decode(batch["targets"][row][:4]) == f"{colour} {form} {place} end"
        assert codec.encode(f"{colour} {form}") == batch["tokens"][row][1:3].tolist()


def named(shown):
    """The colour whose channels go with these; white where all are alike."""
    if np.ptp(shown) < 0.05:
        return "white"
    return max(set(COLOURS) - {"white"}, key=lambda name: np.corrcoef(shown, COLOURS[name])[0, 1])


def test_placeholders_come_before_the_caption():
    data = dataclasses.replace(DATA, visual_tokens=4, length=10)
    plain, batch = DATA.build(0).batch(0), data.build(0).batch(0)
    assert (batch["tokens"][:, :4] == 2).all()
    np.testing.assert_array_equal(batch["tokens"][:, 4:9], plain["tokens"])
    np.testing.assert_array_equal(batch["loss_mask"][:, 4:9], plain["loss_mask"])
    assert not batch["loss_mask"][:, :4].any()
    assert (batch["positions"][:, 9] == -1).all()


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_areas_are_those_of_the_forms(form):
    """Pixels inside, against the areas of plane geometry in units of the radius squared; 5 % for the pixels' edges."""
    area = {
        "disc": np.pi,
        "square": 1.7**2,
        "triangle": 1.7 * 0.85,
        "cross": 2 * 0.6 * 2 - 0.6**2,
        "ring": np.pi * (1 - 0.25),
        "diamond": 2 * 1.1**2,
    }[FORMS[form]]
    random = np.random.default_rng(1)
    inside = picture(5, form, 0, 400, 0.0, random)[..., 0] > 0.3
    radius = 400 * np.random.default_rng(1).uniform(1 / 6, 1 / 4)
    assert inside.sum() / radius**2 == pytest.approx(area, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"length": 4}, "length"),
        ({"visual_tokens": 4}, "length"),
        ({"visual_tokens": -1}, "visual_tokens"),
        ({"side": 8}, "side"),
        ({"noise": -0.1}, "noise"),
        ({"eval_rows": 12}, "eval_rows"),
    ],
)
def test_what_does_not_fit_is_said(changes, field):
    with pytest.raises(ConfigError, match=field):
        validate(dataclasses.replace(DATA, **changes))
