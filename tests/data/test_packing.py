"""Packing against brute force on random documents: what a row holds, and that no token is lost or counted twice."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.data import ConcatAndSplit, Data, FirstFit, InMemory, Padded
from llmjax.data.byte_tokenizer import ByteCodec
from llmjax.data.corpus import Corpus, write_token_shards
from llmjax.data.first_fit import first_fit
from llmjax.data.packing import empty_batch, fill_row
from tests.evidence import evidence

LENGTH = 16
PACKINGS = [ConcatAndSplit(), ConcatAndSplit(cut_attention=False, shift=False), FirstFit(), Padded()]
EOS = ByteCodec.eos_id


@pytest.fixture(params=[2**29, 40], ids=["one shard", "many shards"])
def corpus(request, tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, size=size).tolist() for size in (3, 16, 1, 15, 40, 5, 17, 31, 32, 2, 7, 0, 64)]
    write_token_shards(tmp_path / "c", documents, vocab_size=257, bos_id=256, eos_id=256, shard_tokens=request.param)
    return Corpus(tmp_path / "c"), [document for document in documents if document]


def rows_of(corpus, plan, shift=0.0):
    batch = empty_batch(len(plan), LENGTH)
    for row in range(len(plan)):
        fill_row(batch, row, corpus, plan.pieces(row, shift), ByteCodec())
    return batch


def segments(batch):
    """(row, tokens, targets, positions) of each segment, read off the arrays alone."""
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            where = ids == segment
            yield row, *(batch[name][row][where].tolist() for name in ("tokens", "targets", "positions"))


def transitions(documents):
    """Every (input, target) of every document: the multiset that evaluation must hold exactly once."""
    return collections.Counter(pair for doc in documents for pair in zip([EOS, *doc], [*doc, EOS]))


@pytest.mark.parametrize("packing", PACKINGS, ids=repr)
def test_evaluation_holds_every_token_exactly_once(corpus, packing):
    corpus, documents = corpus
    batch = rows_of(corpus, packing.plan(corpus.starts, LENGTH, evaluation=True))
    real = batch["loss_mask"] > 0
    found = collections.Counter(zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist()))
    assert found == transitions(documents)
    assert batch["target_bytes"].sum() == sum(map(len, documents))


@pytest.mark.parametrize("packing", PACKINGS, ids=repr)
@pytest.mark.parametrize("shift", [0.0, 0.37])
def test_rows_are_well_formed(corpus, packing, shift):
    corpus, documents = corpus
    batch = rows_of(corpus, packing.plan(corpus.starts, LENGTH, evaluation=False), shift)
    stream = [token for document in documents for token in [EOS, *document]] * 2 + [EOS]
    runs = {tuple(stream[i : i + n + 1]) for i in range(len(stream) // 2) for n in range(1, LENGTH + 1)}
    for _, tokens, targets, positions in segments(batch):
        assert positions == list(range(len(tokens)))
        assert tokens[1:] == targets[:-1]
        assert (*tokens, targets[-1]) in runs
        if not (isinstance(packing, ConcatAndSplit) and not packing.cut_attention):
            assert EOS not in tokens[1:]
    for name, array in batch.items():
        assert (array[batch["segment_ids"] == 0] == -(name == "positions")).all(), name
    np.testing.assert_array_equal(batch["loss_mask"], batch["segment_ids"] > 0)
    np.testing.assert_array_equal(batch["target_bytes"], (batch["segment_ids"] > 0) & (batch["targets"] != EOS))
    assert {a.dtype.name for n, a in batch.items() if n != "loss_mask"} == {"int32"}
    assert batch["loss_mask"].dtype == np.float32


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.999])
def test_an_epoch_of_windows_is_full_and_repeats_no_token(corpus, shift):
    corpus, documents = corpus
    plan = ConcatAndSplit().plan(corpus.starts, LENGTH, evaluation=False)
    batch = rows_of(corpus, plan, shift)
    assert batch["loss_mask"].min() == 1
    assert len(plan) == len(corpus) // LENGTH
    found = collections.Counter(zip(batch["tokens"].ravel().tolist(), batch["targets"].ravel().tolist()))
    left_out = transitions(documents) - found
    assert not found - transitions(documents)
    assert left_out.total() == len(corpus) % LENGTH


def brute_force_first_fit(sizes, capacity):
    rows = []
    for size in sizes:
        row = next((r for r, used in enumerate(rows) if used + size <= capacity), len(rows))
        rows += [0] * (row == len(rows))
        rows[row] += size
        yield row


@evidence("F15", oracle="first fit by brute force (Johnson 1973) on random sizes", code="llmjax.data.first_fit")
def test_first_fit_is_first_fit(evidence):
    wrong = []

    @settings(max_examples=200, deadline=None)
    @given(
        st.integers(1, 30).flatmap(
            lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=60))
        )
    )
    def check(case):
        capacity, sizes = case
        wrong.append(list(first_fit(sizes, capacity)) != list(brute_force_first_fit(sizes, capacity)))

    check()
    evidence.record(error=sum(wrong), tolerance=0)


@jax.jit
def attention_features(tokens, positions, segment_ids):
    """jax's own attention over token and position embeddings, within a segment: [rows, length, 8]."""
    table, place = jax.random.normal(jax.random.key(0), (2, 257, 1, 8))
    x = table[tokens] + place[positions]
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(x, x, x, mask=mask, is_causal=True)[:, :, 0]


@evidence("F15", oracle="jax.nn.dot_product_attention on each document alone", code="llmjax.data.packing")
@pytest.mark.parametrize("packing", [ConcatAndSplit(), FirstFit()], ids=repr)
def test_packed_equals_unpacked(evidence, corpus, packing):
    corpus, _ = corpus
    batch = rows_of(corpus, packing.plan(corpus.starts, LENGTH, evaluation=True))
    packed = attention_features(*(jnp.asarray(batch[n]) for n in ("tokens", "positions", "segment_ids")))
    found = list(segments(batch))
    alone = np.zeros((3, len(found), LENGTH), np.int32)
    for index, (_, tokens, _, _) in enumerate(found):
        alone[:, index, : len(tokens)] = tokens, range(len(tokens)), [1] * len(tokens)
    want = np.asarray(attention_features(*jnp.asarray(alone)))[alone[2] > 0]
    got = np.asarray(packed)[batch["segment_ids"] > 0]
    # float32 sums over at most 16 keys in another order
    evidence.record(error=np.abs(got - want).max(), tolerance=1e-5)


@evidence(
    "F14", oracle="closed form: sum of bigram log-probabilities over the unpadded documents", code="llmjax.data.padded"
)
@pytest.mark.parametrize("packing", PACKINGS, ids=repr)
def test_loss_with_padding_equals_loss_without(evidence, corpus, packing):
    corpus, documents = corpus
    logp = np.asarray(jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (257, 257))), np.float64)
    want = sum(logp[a, b] for doc in documents for a, b in zip([EOS, *doc], [*doc, EOS]))
    batch = rows_of(corpus, packing.plan(corpus.starts, LENGTH, evaluation=True))
    got = (logp[batch["tokens"], batch["targets"]] * batch["loss_mask"]).sum()
    evidence.record(error=abs(got - want) / abs(want), tolerance=1e-12)  # float64 sums in another order


def test_padded_keeps_one_document_a_row_and_truncates_only_when_told(corpus):
    corpus, documents = corpus
    whole = Padded().plan(corpus.starts, LENGTH, evaluation=False)
    cut = Padded(truncate=True).plan(corpus.starts, LENGTH, evaluation=False)
    assert len(whole) == sum(-(-(len(document) + 1) // LENGTH) for document in documents)
    assert len(cut) == len(documents)
    batch = rows_of(corpus, cut)
    for row, document in enumerate(documents):
        assert batch["tokens"][row, : min(LENGTH, len(document) + 1)].tolist() == [EOS, *document][:LENGTH]
    assert batch["segment_ids"].max() == 1
    assert len(Padded(truncate=True).plan(corpus.starts, LENGTH, evaluation=True)) == len(whole)


def test_separate_begin_and_end_tokens(tmp_path):
    write_token_shards(tmp_path / "c", [[5, 6], [7]], vocab_size=257, bos_id=1, eos_id=2)
    corpus = Corpus(tmp_path / "c")
    batch = rows_of(corpus, ConcatAndSplit().plan(corpus.starts, LENGTH, evaluation=True))
    assert batch["tokens"][0, :5].tolist() == [1, 5, 6, 1, 7]
    assert batch["targets"][0, :5].tolist() == [5, 6, 2, 7, 2]


def test_shifted_epochs_differ(tmp_path):
    source = InMemory(tuple(f"document number {i} says {i * i}" for i in range(40)))
    from llmjax.data import Bytes

    for shift, same in ((True, False), (False, True)):
        data = Data(source, Bytes(), ConcatAndSplit(shift=shift), length=64, batch_size=1)
        pipeline = data.build(0, tmp_path)
        epoch = sum(len(t) + 1 for t in source.texts if t.encode() in pipeline.train_text()) // 64
        rows = [{pipeline.batch(e * epoch + i)["tokens"].tobytes() for i in range(epoch)} for e in range(2)]
        assert (rows[0] == rows[1]) == same
