"""The pipeline as a function of (seed, step): resuming, slicing over hosts, mixing, evaluation and speed."""

import time
from collections import Counter

import numpy as np
import pytest

from llmjax.config import InputError, with_
from llmjax.data import BPE, Bytes, ConcatAndSplit, Data, FirstFit, InMemory, Mixture, Padded, PythonDocs
from tests.evidence import evidence

TEXTS = tuple(f"document {i}: {'word ' * (i % 17)}the end of {i}" for i in range(120))
DATA = Data(InMemory(TEXTS, holdout=0.1), BPE(270), length=32, batch_size=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def different(a, b):
    """Number of arrays of two batches that differ in any bit."""
    assert a.keys() == b.keys()
    return sum(a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes() for name in a)


@evidence(
    "F09", oracle="the uninterrupted stream, bitwise; grain's own iterator for the order", code="llmjax.data.pipeline"
)
@pytest.mark.parametrize("packing", [ConcatAndSplit(), FirstFit(), Padded()], ids=repr)
def test_resuming_equals_the_uninterrupted_stream(evidence, cache, tmp_path, packing):
    data = with_(DATA, "packing", packing)
    first, again = data.build(3, cache), data.build(3, tmp_path)
    stream = [first.batch(step) for step in range(60)]
    wrong = sum(different(stream[step], again.batch(step)) for step in (59, 20, 21, 22, 0))
    order = first._order.to_iter_dataset()
    iterator = iter(order)
    walked = [next(iterator) for _ in range(100)]
    iterator.set_state({"next_index": 40})
    wrong += sum(first._order[i] != address for i, address in enumerate(walked)) + (next(iterator) != walked[40])
    evidence.record(error=wrong, tolerance=0)
    assert first.fingerprint == again.fingerprint


def test_batches_depend_on_seed_and_step(cache):
    batches = [DATA.build(seed, cache).batch(step)["tokens"].tobytes() for seed in (0, 1) for step in (0, 1, 500)]
    assert len(set(batches)) == 6


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4), slice(1, 4, 2)])
def test_a_hosts_rows_are_those_of_the_global_batch(cache, rows):
    pipeline = DATA.build(0, cache)
    for step in (0, 7):
        whole = pipeline.batch(step)
        assert different({name: array[rows] for name, array in whole.items()}, pipeline.batch(step, rows)) == 0
    for whole, part in zip(pipeline.eval_batches(), pipeline.eval_batches(rows=rows), strict=True):
        assert different({name: array[rows] for name, array in whole.items()}, part) == 0


def test_every_epoch_sees_every_row_once(cache):
    data = with_(with_(DATA, "packing", ConcatAndSplit(shift=False)), "batch_size", 1)
    pipeline = data.build(0, cache)
    epoch = len(pipeline._parts[0].train_plan)
    epochs = [[pipeline.batch(e * epoch + i)["tokens"].tobytes() for i in range(epoch)] for e in range(3)]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert epochs[0] != epochs[1]


@evidence("F10", oracle="chi-square against the weights, 2 degrees of freedom (table)", code="llmjax.data.mixture")
def test_mixtures_keep_their_proportions(evidence, cache):
    weights = (5.0, 3.0, 2.0)
    sources = tuple(
        InMemory(tuple(letter * 50 for _ in range(count)), holdout=0.0) for letter, count in zip("abc", (300, 150, 90))
    )
    data = Data(Mixture(sources, weights), Bytes(), length=50, batch_size=10)
    pipeline, again = data.build(0, cache), data.build(0, cache)
    rows = [bytes(row[row < 256].astype(np.uint8))[:1] for step in range(200) for row in pipeline.batch(step)["tokens"]]
    observed = np.array([rows.count(letter) for letter in (b"a", b"b", b"c")])
    expected = len(rows) * np.array(weights) / sum(weights)
    evidence.record(error=((observed - expected) ** 2 / expected).sum(), tolerance=13.82)  # p = 0.001
    assert different(pipeline.batch(150), again.batch(150)) == 0
    assert len(set(rows[:10])) == 3


def test_a_mixture_in_a_mixture_and_its_evaluation(cache):
    inner = Mixture((InMemory(TEXTS[:40], holdout=0.2), InMemory(TEXTS[40:80], holdout=0.2)))
    outer = Mixture((inner, InMemory(TEXTS[80:], holdout=0.2)), (1.0, 1.0))
    assert [weight for _, weight in outer.parts()] == [0.25, 0.25, 0.5]
    pipeline = with_(DATA, "source", outer).build(0, cache)
    held_out = [t for t in TEXTS if t.encode() in pipeline.eval_text()]
    counted = sum(int(batch["target_bytes"].sum()) for batch in pipeline.eval_batches())
    assert counted == len(pipeline.eval_text()) == sum(len(t) for t in held_out)
    assert len(pipeline.train_text()) + len(pipeline.eval_text()) == sum(map(len, TEXTS))


@pytest.mark.parametrize("packing", [ConcatAndSplit(), FirstFit(), Padded()], ids=repr)
def test_evaluation_counts_every_held_out_byte_once(cache, packing):
    pipeline = with_(DATA, "packing", packing).build(0, cache)
    batches = list(pipeline.eval_batches())
    assert sum(int(batch["target_bytes"].sum()) for batch in batches) == len(pipeline.eval_text())
    documents = sum(int((batch["targets"] == pipeline.tokenizer.eos_id).sum()) for batch in batches)
    assert documents == sum(t.encode() in pipeline.eval_text() for t in TEXTS)
    assert all(batch["tokens"].shape == (4, 32) for batch in batches)
    assert len(list(pipeline.eval_batches(max_batches=1))) == 1
    decoded = [
        pipeline.tokenizer.decode(b["targets"][r][b["loss_mask"][r] > 0].tolist()) for b in batches for r in range(4)
    ]
    if not isinstance(packing, FirstFit):  # which puts pieces out of order
        assert "".join(decoded).encode() == pipeline.eval_text()


def test_without_held_out_documents_evaluation_says_so(cache):
    pipeline = with_(DATA, "source", InMemory(TEXTS, holdout=0.0)).build(0, cache)
    with pytest.raises(InputError, match="nothing is held out"):
        next(pipeline.eval_batches())


def test_a_damaged_cache_is_made_again(tmp_path):
    want = DATA.build(0, tmp_path).batch(0)
    files = sorted((tmp_path / "tokens").rglob("*.tokens"))
    files[0].write_bytes(b"")
    files[1].unlink()
    assert different(DATA.build(0, tmp_path).batch(0), want) == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("length", 33),
        ("batch_size", 5),
        ("source.holdout", 0.2),
        ("source.fold", 1),
        ("source.texts.0", "other"),
        ("tokenizer.vocab_size", 271),
        ("packing.shift", False),
        ("packing.cut_attention", False),
    ],
)
def test_every_setting_changes_the_batches(cache, path, value):
    data = with_(DATA, path, value)
    a, b = DATA.build(0, cache), data.build(0, cache)
    assert a.fingerprint != b.fingerprint
    assert any(different(a.batch(step), b.batch(step)) for step in range(3))


def tokens_per_second(pipeline, batches=50):
    """Warm throughput of the loader: the best of five runs, so that what else the machine does counts little."""
    size = pipeline.batch(0)["tokens"].size
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for step in range(batches):
            pipeline.batch(step)
        best = max(best, batches * size / (time.perf_counter() - start))
    return best


@pytest.mark.parametrize("packing", [ConcatAndSplit(), FirstFit(), Padded()], ids=repr)
def test_the_loader_is_not_what_a_step_waits_for(cache, packing, capsys):
    """A training step on two cores does some thousand tokens a second; the loader must be far above."""
    start = time.perf_counter()
    pipeline = Data(PythonDocs(), BPE(2048), packing, length=256, batch_size=8).build(0, cache)
    built = time.perf_counter() - start
    rate = tokens_per_second(pipeline)
    with capsys.disabled():
        print(f"\n{packing}: built in {built:.2f} s, {rate / 2048:,.0f} batches/s, {rate:,.0f} tokens/s")
    assert rate > 200_000
