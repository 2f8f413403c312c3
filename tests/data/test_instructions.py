"""Instructions: which targets the loss counts, against brute force from the records; templates; what is left out."""

import json
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmjax.config import ConfigError, InputError, validate
from llmjax.data import Bytes, ConcatAndSplit, Data, FirstFit, Padded, TokenizerJson
from llmjax.data.instructions import Instructions, Template
from llmjax.data.reading import Reading
from llmjax.data.splits import held_out
from tests.evidence import evidence

WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add {the} numbers.

### Input:
1, 2

### Response:"""
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Say hello.

### Response:"""
PLAIN = Template(with_input="{instruction} | {input} >", without_input="{instruction} >")


def records():
    """Records whose texts hold markers, end tokens and braces, and responses that also stand in their prompts."""
    words = ("### Response:", "<|endoftext|>", "{input}", "é", "say", "hello", "\n\n", "> hi")
    draw = np.random.default_rng(0)

    def text(most):
        return " ".join(["a", *draw.choice(words, draw.integers(0, most))])

    found = [{"instruction": f"{i} {text(3)}", "input": text(3) * (i % 2), "output": text(5)} for i in range(60)]
    return [
        *found,
        {"instruction": "say hello", "input": "", "output": "say hello"},
        {"instruction": "a", "output": "b"},
    ]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def prompt_of(record):
    """The prompt written out by hand."""
    given = f" | {record['input']}" if record.get("input") else ""
    return f"{record['instruction']}{given} >"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A byte-level BPE of the `tokenizers` library, merges across every boundary of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prompt_of(r) + r["output"] for r in records()], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return TokenizerJson(str(path))


def segments(batch):
    """(tokens, targets, mask) of each segment of each row."""
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            yield [batch[name][row][ids == segment].tolist() for name in ("tokens", "targets", "loss_mask")]


def built(source, tokenizer, packing, length, folder, **fields):
    return Data(source, tokenizer, packing, length=length, batch_size=4, **fields).build(0, folder / "cache")


@evidence("G38", oracle="prompt and response joined by brute force from the records", code="llmjax.data.instructions")
@pytest.mark.parametrize("packing", [Padded(), FirstFit()], ids=repr)
@pytest.mark.parametrize("kind", ["bytes", "library"])
def test_the_loss_is_on_responses_and_their_ends(packing, kind, library, tmp_path, evidence):
    """Whole rows, in training and evaluation: targets with mask 1 are response + end, those with mask 0 the prompt."""
    tokenizer = Bytes() if kind == "bytes" else library
    source = Instructions(write(tmp_path / "a.jsonl", records()), template=PLAIN, longest=192, holdout=0.2)
    pipeline = built(source, tokenizer, packing, 192, tmp_path)
    codec = pipeline.tokenizer
    expected = {True: Counter(), False: Counter()}
    for record in records():
        prompt, response = codec.encode(prompt_of(record)), [*codec.encode(record["output"]), codec.eos_id]
        expected[held_out(prompt_of(record), 0.2)][tuple(prompt), tuple(response)] += 1
    steps = range(-(-sum(expected[False].values()) // 4))
    for split, batches in ((True, pipeline.eval_batches()), (False, map(pipeline.batch, steps))):
        found = Counter()
        for tokens, targets, mask in (s for batch in batches for s in segments(batch)):
            prompt = [t for t, m in zip(targets, mask) if m == 0]
            assert tokens == [codec.bos_id, *targets[:-1]]
            assert mask == sorted(mask)
            found[tuple(prompt), tuple(targets[len(prompt) :])] += 1
        if split:
            evidence.record(sum((found - expected[split]).values()) + sum((expected[split] - found).values()), 0)
        else:
            evidence.record(len(found.keys() - expected[split].keys()), 0)


@pytest.mark.parametrize("packing", [Padded(), FirstFit(), ConcatAndSplit(), ConcatAndSplit(False, False)], ids=repr)
def test_cut_records_keep_their_masks(packing, tmp_path):
    """Rows of 16, anywhere cut: every (target, mask) of the records is there exactly once in evaluation."""
    source = Instructions(write(tmp_path / "a.jsonl", records()), template=PLAIN, longest=192, holdout=0.5)
    pipeline = built(source, Bytes(), packing, 16, tmp_path)
    expected = Counter()
    for record in records():
        prompt = prompt_of(record)
        if held_out(prompt, 0.5):
            expected.update((byte, 0.0) for byte in prompt.encode())
            expected.update((byte, 1.0) for byte in [*record["output"].encode(), 256])
    found = Counter()
    for batch in pipeline.eval_batches():
        real = batch["segment_ids"] > 0
        found.update(zip(batch["targets"][real].tolist(), batch["loss_mask"][real].tolist()))
        assert not batch["loss_mask"][~real].any()
        np.testing.assert_array_equal(batch["target_bytes"], real & (batch["targets"] != 256))
        assert batch["tokens"].max() <= 256
    assert found == expected


def test_alpacas_prompts_to_the_byte():
    """Both variants, as published; no input and the marker of Self-Instruct are one."""
    assert Template().prompt("Add {the} numbers.", "1, 2") == WITH_INPUT
    for none in ("", "  ", "<noinput>"):
        assert Template().prompt("Say hello.", none) == WITHOUT_INPUT


def test_text_is_prompt_and_response(tmp_path):
    """What a tokenizer is trained on, and where generation starts."""
    source = Instructions(write(tmp_path / "a.jsonl", records()), template=PLAIN, holdout=0.0)
    wanted = [prompt_of(record) + record["output"] for record in records()]
    assert list(source.documents("train", Reading(tmp_path))) == wanted


BAD = [
    ({"output": "b"}, r"there is no field 'instruction'; the fields here are: 'output'"),
    ({"instruction": "a"}, r"there is no field 'output'"),
    ({"instruction": "a", "output": 3}, r"field 'output' holds a int, not a string"),
    ({"instruction": "a", "input": ["x"], "output": "b"}, r"field 'input' holds a list, not a string"),
    ({"instruction": " ", "output": "b"}, r"the instruction is empty"),
    ({"instruction": "a", "output": ""}, r"the output is empty"),
    ({"instruction": "a", "input": "\ud800", "output": "b"}, r"the text holds half of a surrogate pair"),
    ({"instruction": "a", "output": "b" * 29}, r"the record has 33 tokens, more than longest=32"),
    ([1], r"this is a JSON list"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_is_named_or_skipped_and_counted(record, message, tmp_path):
    """One line with file and number; what is left is the good record, and the one that just fits."""
    good = [{"instruction": "a", "output": "c"}, {"instruction": "a", "output": "d" * 28}]
    source = Instructions(write(tmp_path / "a.jsonl", [*good, record]), template=PLAIN, longest=32, holdout=0.0)
    with pytest.raises(InputError, match=rf"a.jsonl:3: {message}") as caught:
        built(source, Bytes(), Padded(), 32, tmp_path)
    assert "\n" not in str(caught.value)
    for _ in range(2):  # the second reads the cache
        pipeline = built(source, Bytes(), Padded(), 32, tmp_path, on_error="skip")
        assert pipeline.skipped == 1
        assert sorted(pipeline.batch(0)["loss_mask"].sum(axis=1).tolist()) == [2, 2, 29, 29]


def test_a_damaged_cache_is_written_again_and_an_empty_split_named(tmp_path):
    """As of other sources."""
    source = Instructions(write(tmp_path / "a.jsonl", records()), template=PLAIN, holdout=0.0)
    first = built(source, Bytes(), Padded(), 192, tmp_path).batch(0)
    (tokens,) = (tmp_path / "cache").rglob("*.tokens")
    tokens.write_bytes(b"12")
    np.testing.assert_array_equal(built(source, Bytes(), Padded(), 192, tmp_path).batch(0)["tokens"], first["tokens"])
    with pytest.raises(InputError, match="has no records in its validation split: holdout=0.0001 of the documents"):
        built(Instructions(source.path, template=PLAIN, holdout=0.0001), Bytes(), Padded(), 192, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Instructions(longest=1), r"longest=1 leaves no room"),
        (Instructions(holdout=1.0), r"holdout=1.0 is no fraction"),
        (Template(without_input="> "), r"without_input.* must hold \{instruction\}, each once"),
        (Template(with_input="{instruction} >"), r"with_input.* must hold \{input\} and \{instruction\}, each once"),
        (Template(without_input="{instruction} {text}"), r"without_input.* must hold \{instruction\}, each once"),
        (Template(without_input="{instruction} {}"), r"without_input.* must hold \{instruction\}, each once"),
        (Template(without_input="{instruction} {"), r"without_input.* is no template .*: write braces"),
    ],
)
def test_configs_that_cannot_be_right(config, message):
    with pytest.raises(ConfigError, match=message):
        validate(config)
