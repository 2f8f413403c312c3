"""Tokenizers against the `tokenizers` library, a brute-force BPE and the law that text comes back."""

import collections
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.config import InputError, validate
from llmjax.data import BPE, Bytes, InMemory, TokenizerJson
from llmjax.data.bpe import train
from llmjax.data.reading import Reading
from tests.evidence import evidence

TEXTS = (
    "low low low low low lower lower newest newest newest newest newest newest widest widest widest",
    "Zoë naïve 東京 🙂\n",
)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    return Reading(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def codecs(reading):
    source = InMemory(TEXTS, holdout=0.0)
    return [Bytes().resolve(source, reading), BPE(300).resolve(source, reading)]


def _check_round_trip(codec, text):
    ids = codec.encode(text)
    assert codec.decode(ids) == text
    assert codec.token_bytes[ids].sum() == len(text.encode())
    assert all(0 <= i < codec.vocab_size and i not in (codec.bos_id, codec.eos_id) for i in ids)


@evidence("F01", oracle="Python's UTF-8 codec on random Unicode (hypothesis)", code="llmjax.data.byte_tokenizer")
def test_bytes_are_utf8(evidence, codecs):
    codec = codecs[0]
    wrong = []

    @settings(max_examples=200, deadline=None)
    @given(unicode_text)
    def check(text):
        _check_round_trip(codec, text)
        wrong.append(bytes(codec.encode(text)) != text.encode())

    check()
    evidence.record(error=sum(wrong), tolerance=0)


def test_bpe_loses_nothing(codecs):
    @settings(max_examples=200, deadline=None)
    @given(unicode_text)
    def check(text):
        _check_round_trip(codecs[1], text)

    check()
    _check_round_trip(codecs[1], "<|endoftext|> </s>")
    assert codecs[1].encode_batch(list(TEXTS)) == [codecs[1].encode(text) for text in TEXTS]


def brute_force_merges(words, rounds):
    """Sennrich et al. 2015, algorithm 1: merge the most frequent pair; among equals the one of the lowest ids."""
    ids = {character: i for i, character in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    table = {tuple(word): count for word, count in words.items()}
    merges = []
    for _ in range(rounds):
        pairs = collections.Counter()
        for word, count in table.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        table = {_merge(word, best): count for word, count in table.items()}
    return merges


def _merge(word, pair):
    out, at = [], 0
    while at < len(word):
        joined = word[at : at + 2] == pair
        out.append("".join(pair) if joined else word[at])
        at += 2 if joined else 1
    return tuple(out)


@evidence("F02", oracle="Sennrich 2015 algorithm 1, brute force, on the paper's toy words", code="llmjax.data.bpe")
def test_bpe_merges_are_those_of_the_algorithm(evidence):
    text = TEXTS[0]
    words = collections.Counter(word for word, _ in tokenizers.pre_tokenizers.ByteLevel(False).pre_tokenize_str(text))
    expected = brute_force_merges(words, 12)
    merges = json.loads(train(iter([text]), 256 + len(expected)).to_str())["model"]["merges"]
    assert len(merges) == len(expected) == 12
    assert expected[:2] == [("e", "s"), ("es", "t")]  # as in the paper
    evidence.record(error=sum(tuple(a) != b for a, b in zip(merges, expected)), tolerance=0)


@evidence("F02", oracle="tokenizers.Tokenizer trained and called directly", code="llmjax.data.bpe")
def test_bpe_ids_are_the_librarys(evidence, reading):
    text = " ".join(f"{word} {word}s un{word}ed" for word in ("cat", "dog", "train", "token", "merge", "byte") * 20)
    codec = BPE(280).resolve(InMemory((text,), holdout=0.0), reading)
    library = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    library.train_from_iterator([text], vocab_size=279, show_progress=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert [library.id_to_token(i) for i in range(256)] == alphabet
    evidence.record(error=int(codec.encode(text) != library.encode(text).ids), tolerance=0)
    assert codec.token_bytes[278] > 1  # the last merge


def test_bpe_training_is_deterministic_across_processes_and_threads():
    program = (
        "import hashlib; from pydoc_data.topics import topics; from llmjax.data.bpe import train;"
        "print(hashlib.sha256(train(iter(list(topics.values())[:30]), 900).to_str().encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"RAYON_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(runs) == 1


def test_bpe_end_of_text_is_the_last_id_and_unused_ids_stand_for_nothing(codecs):
    codec = codecs[1]
    assert codec.vocab_size == 300
    assert codec.bos_id == codec.eos_id == 299
    assert codec.token_bytes[299] == 0
    assert codec.decode([299, *codec.encode("low"), 299]) == "low"
    with pytest.raises(InputError, match="257"):
        validate(BPE(256))


@pytest.fixture
def saved(tmp_path):
    """A tokenizer.json as a model would come with: byte-level BPE, two special tokens and an added word."""
    library = train(iter(TEXTS * 3), 290)
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens(["東京"])
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@evidence("F05", oracle="tokenizers.Tokenizer.from_file(...).encode", code="llmjax.data.tokenizer_json")
def test_tokenizer_json_ids_are_the_librarys(evidence, saved, reading):
    codec = TokenizerJson(str(saved)).resolve(InMemory(), reading)
    library = tokenizers.Tokenizer.from_file(str(saved))
    wrong = []

    @settings(max_examples=100, deadline=None)
    @given(unicode_text.map(lambda text: text + "newest 東京"))
    def check(text):
        wrong.append(codec.encode(text) != library.encode(text, add_special_tokens=False).ids)
        _check_round_trip(codec, text)

    check()
    evidence.record(error=sum(wrong), tolerance=0)
    assert codec.vocab_size == library.get_vocab_size()
    assert (codec.bos_id, codec.eos_id) == (library.token_to_id("<s>"), library.token_to_id("</s>"))


def test_special_tokens_in_a_text_are_plain_text(saved, reading):
    codec = TokenizerJson(str(saved)).resolve(InMemory(), reading)
    ids = codec.encode("a</s>b")
    assert codec.eos_id not in ids
    assert codec.decode(ids) == "a</s>b"


def test_byte_fallback_vocabulary_counts_bytes(tmp_path, reading):
    vocabulary = {"<unk>": 0, "</s>": 1, "▁a": 2, "b": 3, "é": 4} | {f"<0x{i:02X}>": 5 + i for i in range(256)}
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    library.add_special_tokens(["<unk>", "</s>"])
    library.save(str(tmp_path / "t.json"))
    codec = TokenizerJson(str(tmp_path / "t.json")).resolve(InMemory(), reading)
    np.testing.assert_array_equal(codec.token_bytes[:5], [0, 0, 2, 1, 2])
    np.testing.assert_array_equal(codec.token_bytes[5:], 1)


@pytest.mark.parametrize(("eos", "bos"), [("<nope>", ""), ("", "<nope>")])
def test_tokenizer_json_names_the_token_that_is_missing(saved, reading, eos, bos):
    with pytest.raises(InputError, match=r"tokenizer.json: there is no token '<nope>'"):
        TokenizerJson(str(saved), eos=eos, bos=bos).resolve(InMemory(), reading)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, reading, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(InputError, match=r"bad.json: this is no tokenizer.json"):
        TokenizerJson(str(tmp_path / "bad.json")).resolve(InMemory(), reading)
    with pytest.raises(InputError, match=r"no such file"):
        TokenizerJson(str(tmp_path / "absent.json")).resolve(InMemory(), reading)


def test_bpe_without_documents_says_so(reading):
    with pytest.raises(InputError, match="no training documents"):
        BPE(300).resolve(InMemory(), reading)
