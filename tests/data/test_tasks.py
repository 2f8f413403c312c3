"""Synthetic tasks: every answer is worked out again from what the model sees, by the task's own definition."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from llmjax.config import ConfigError, InputError, subclasses, validate
from llmjax.data import Synthetic
from llmjax.data.tasks.base import Task, places
from llmjax.data.tasks.copying import Copying
from llmjax.data.tasks.induction import Induction
from llmjax.data.tasks.needle import Needle
from llmjax.data.tasks.permutations import Permutations
from llmjax.data.tasks.recall import Recall
from llmjax.data.tasks.selective_copying import SelectiveCopying
from tests.evidence import evidence

TASKS = (
    Copying(letters=5),
    Induction(letters=6),
    Needle(needles=3, keys=5, hay=4),
    Permutations(degree=4),
    Permutations(degree=4, swaps=True),
    Permutations(degree=4, chain=True),
    Recall(pairs=4, keys=6),
    SelectiveCopying(count=4, letters=5),
)
LENGTHS = (29, 30)


def after_key(seen, key):
    """What follows the only earlier `key` in what is seen."""
    (place,) = (i for i, symbol in enumerate(seen[:-1]) if symbol == key)
    return seen[place + 1]


def copying(task, tokens, place):
    """As far behind the separator as in the text before it."""
    seen = tokens[: place + 1]
    text = seen[len(tokens) % 2 :]
    separator = text.index(0)
    return text[len(text) - 1 - separator]


def induction(task, tokens, place):
    """The most frequent letter after earlier triggers: there is but one."""
    assert tokens[place] == 0
    (letter,) = {tokens[i + 1] for i in range(place) if tokens[i] == 0}
    return letter


def needle(task, tokens, place):
    """The value of the key that was asked for."""
    return after_key(tokens[: place + 1], tokens[place])


def permutations(task, tokens, place):
    """Things moved one permutation after the other, on matrices: row p(i) of P(p) has its one in column i."""
    listed = list(itertools.permutations(range(task.degree)))
    matrix = np.eye(task.degree, dtype=int)
    for token in tokens[: place + 1 : 1 + task.chain]:
        matrix = np.eye(task.degree, dtype=int)[:, list(listed[token])] @ matrix
    return task.chain * len(listed) + listed.index(tuple(int(i) for i in matrix.argmax(axis=0)))


def selective_copying(task, tokens, place):
    """The letter that has as many letters before it as there are markers before this one."""
    letters = [symbol for symbol in tokens[:place] if symbol > 1]
    return letters[tokens[:place].count(1)]


ORACLES = {
    Copying: copying,
    Induction: induction,
    Needle: needle,
    Permutations: permutations,
    Recall: needle,
    SelectiveCopying: selective_copying,
}
# How many answers a row of some length has, by the task's definition.
COUNTS = {
    Copying: lambda task, length: length // 2,
    Induction: lambda task, length: (length + 1) // (task.letters + 1) - 1,
    Needle: lambda task, length: task.needles,
    Permutations: lambda task, length: (length + task.chain) // (1 + task.chain),
    Recall: lambda task, length: task.pairs,
    SelectiveCopying: lambda task, length: task.count,
}


def test_every_task_has_an_oracle():
    assert set(subclasses(Task).values()) == set(ORACLES) == set(COUNTS) == {type(task) for task in TASKS}


@evidence("F51", oracle="answers worked out from the visible tokens, a loop by definition", code="llmjax.data.tasks")
@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_answers_follow_from_what_is_seen(evidence, task):
    """Exact, in 100 rows of an odd and of an even length; the number of answers; ids within the vocabulary."""
    wrong, seen = 0, set()
    for length, number in itertools.product(LENGTHS, range(50)):
        tokens, targets, answers = task.row(length, np.random.default_rng((number, length)))
        assert tokens.shape == targets.shape == answers.shape == (length,)
        assert answers.sum() == COUNTS[type(task)](task, length)
        for place in np.flatnonzero(answers):
            wrong += ORACLES[type(task)](task, tokens.tolist(), int(place)) != targets[place]
        seen.update(tokens.tolist(), targets.tolist())
    assert min(seen) >= 0
    assert max(seen) < task.symbols
    evidence.record(error=wrong, tolerance=0)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_answers_are_not_known_beforehand(task):
    """The commonest answer is right in less than half of the cases: nothing is to be had without looking."""
    rows = [task.row(30, np.random.default_rng(number)) for number in range(100)]
    counts = np.bincount(np.concatenate([targets[answers] for _, targets, answers in rows]))
    assert counts.max() < 0.5 * counts.sum()


@evidence(
    "F55", oracle="law: composition of permutations by itertools and products of matrices", code="llmjax.data.tasks"
)
@pytest.mark.parametrize(("swaps", "tokens"), [(False, 120), (True, 10)])
def test_words_of_five_things_reach_the_whole_group(evidence, swaps, tokens):
    """S5: 120 elements (or its 10 transpositions) as tokens, all 120 as products."""
    task = Permutations(swaps=swaps)
    row = task.row(3000, np.random.default_rng(0))
    assert (len(set(row.tokens.tolist())), len(set(row.targets.tolist()))) == (tokens, math.factorial(5))
    checked = [10, 2999]
    wrong = sum(permutations(task, row.tokens.tolist(), place) != row.targets[place] for place in checked)
    evidence.record(error=wrong, tolerance=0)


def test_pieces_are_laid_out_without_overlap_and_all_layouts_occur():
    """Enumeration: two pieces of 3 in 8 symbols have C(4, 2) = 6 layouts, each drawn about as often (3 sigma)."""
    random = np.random.default_rng(0)
    drawn = [tuple(places(2, 3, 8, random).tolist()) for _ in range(1200)]
    layouts = [(a, b) for a in range(6) for b in range(a + 3, 6)]
    counts = [drawn.count(layout) for layout in layouts]
    assert len(layouts) == 6
    assert sum(counts) == 1200
    assert max(abs(count - 200) for count in counts) < 3 * math.sqrt(1200 * (1 / 6) * (5 / 6))


DATA = Synthetic(task=Recall(pairs=2, keys=4), length=12, batch_size=4, eval_rows=6, eval_length=20)


def rows_of(batch):
    """The tokens of each row that is there."""
    return [tuple(row) for row, ids in zip(batch["tokens"].tolist(), batch["segment_ids"], strict=True) if ids[0]]


def test_a_batch_is_a_function_of_seed_and_step():
    """Two builds agree bitwise in any order; another seed or step gives other rows; a host's rows are the batch's."""
    one, two = DATA.build(3), DATA.build(3)
    batches = {step: one.batch(step) for step in (0, 7, 1)}
    for step in (1, 0, 7):
        again = two.batch(step)
        assert all(np.array_equal(again[name], array) for name, array in batches[step].items())
        part = two.batch(step, slice(1, 3))
        assert all(np.array_equal(part[name], array[1:3]) for name, array in batches[step].items())
    different = [DATA.build(seed).batch(step)["tokens"].tobytes() for seed in (0, 1) for step in (0, 1)]
    assert len(set(different)) == 4


def test_the_loss_counts_the_answers_alone():
    """The mask is the task's; the rest of a batch is one document a row."""
    batch = DATA.build(0).batch(2)
    assert batch["loss_mask"].sum(axis=1).tolist() == [2.0] * 4
    assert np.array_equal(batch["positions"], np.tile(np.arange(12), (4, 1)))
    assert (batch["segment_ids"] == 1).all()
    assert {name: array.dtype.name for name, array in batch.items()}.items() >= {("loss_mask", "float32")}


def test_held_out_rows_are_others_and_longer():
    """Six rows of 20 tokens in batches of four, the rest padding; no training row of 200 steps is one of them."""
    held_out = list(DATA.build(0).eval_batches())
    assert [batch["tokens"].shape for batch in held_out] == [(4, 20), (4, 20)]
    found = [row for batch in held_out for row in rows_of(batch)]
    assert len(found) == len(set(found)) == 6
    padding = held_out[1]["segment_ids"][:, 0] == 0
    assert padding.tolist() == [False, False, True, True]
    assert (held_out[1]["positions"][padding] == -1).all()
    assert held_out[1]["loss_mask"][padding].sum() == 0
    assert len(list(DATA.build(0).eval_batches(1))) == 1
    training = replace(DATA, length=20, task=Recall(pairs=4, keys=16)).build(0)
    seen = {row for step in range(200) for row in rows_of(training.batch(step))}
    longer = replace(DATA, task=Recall(pairs=4, keys=16)).build(0)
    assert seen.isdisjoint(row for batch in longer.eval_batches() for row in rows_of(batch))


def test_the_fingerprint_is_of_what_the_rows_depend_on():
    """Every part of the config counts, the task's class among it; the seed does not."""
    others = [
        DATA,
        replace(DATA, task=Recall(pairs=3, keys=4)),
        replace(DATA, task=Copying(letters=4)),
        replace(DATA, task=SelectiveCopying(count=1, letters=4)),
        replace(DATA, eval_length=21),
        replace(DATA, batch_size=5),
    ]
    assert len({data.build(0).fingerprint for data in others}) == len(others)
    assert DATA.build(0).fingerprint == DATA.build(1).fingerprint


def test_symbols_are_written_as_numbers():
    """The tokenizer of a task: ids as words, there and back."""
    codec = DATA.build(0).tokenizer
    assert (codec.vocab_size, codec.decode([3, 0, 8]), codec.encode("3 0 8")) == (9, " 3 0 8", [3, 0, 8])
    assert DATA.vocab() == 9
    for word in ("9", "-1", "three"):
        with pytest.raises(InputError, match=f"^'{word}' is no symbol of this task: write numbers below 9$"):
            codec.encode(f"3 {word}")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            Synthetic(length=0),
            "length=0 is no number of tokens: use for example 256; task.pairs=8 needs rows of 31 tokens, not 0",
        ),
        (Synthetic(eval_rows=0), "eval_rows=0 is no number of rows: use for example 256"),
        (
            Synthetic(eval_length=-1),
            (
                "eval_length=-1 is no number of tokens: use for example 1024, or None for data.length; "
                "task.pairs=8 needs rows of 31 tokens, not -1"
            ),
        ),
        (Synthetic(task=Recall(pairs=9, keys=8)), "task.pairs=9 must lie between 1 and keys=8"),
        (Synthetic(length=30), "task.pairs=8 needs rows of 31 tokens, not 30"),
        (Synthetic(eval_length=30), "task.pairs=8 needs rows of 31 tokens, not 30"),
        (Synthetic(task=Copying(letters=1)), "task.letters=1 must be at least 2"),
        (Synthetic(task=Copying(), length=1), "task.letters=32 needs rows of 2 tokens, not 1"),
        (Synthetic(task=SelectiveCopying(count=0)), "task.count=0 must be at least 1"),
        (Synthetic(task=SelectiveCopying(letters=1)), "task.letters=1 must be at least 2"),
        (Synthetic(task=SelectiveCopying(), length=15), "task.count=8 needs rows of 16 tokens, not 15"),
        (Synthetic(task=Induction(letters=1)), "task.letters=1 must be at least 2"),
        (Synthetic(task=Induction(), length=30), "task.letters=15 needs rows of 31 tokens, not 30"),
        (Synthetic(task=Permutations(degree=7)), "task.degree=7 must lie between 2 and 6: there are degree! symbols"),
        (Synthetic(task=Needle(needles=17)), "task.needles=17 must lie between 1 and keys=16"),
        (Synthetic(task=Needle(hay=0)), "task.hay=0 must be at least 1"),
        (Synthetic(task=Needle(), length=22), "task.needles=4 needs rows of 23 tokens, not 22"),
    ],
)
def test_bad_values_are_one_line(data, line):
    with pytest.raises(ConfigError) as raised:
        validate(data)
    assert str(raised.value).splitlines()[0] == line


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_the_shortest_row_that_is_valid_has_an_answer(task):
    """Every length is refused, or works: from 1 up."""
    for length in range(1, 26):
        data = Synthetic(task=task, length=length, eval_rows=1)
        if next(iter(task.problems_in(length)), None) is None:
            assert data.build(0).batch(0)["loss_mask"].sum() > 0
