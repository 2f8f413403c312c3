"""Text in, text out: eos, stop strings, pieces that add up to the text."""

import dataclasses

import jax
import numpy as np
import pytest

from llmjax.config import InputError
from llmjax.decode.config import Generate
from llmjax.decode.generate import generate
from llmjax.decode.text import Answer, complete, first_stop, held_back
from tests.decode.models import MODELS, params_of
from tests.evidence import evidence


class Bytes:
    """Latin letters, digits and UTF-8 bytes as they are; the oracle for decoding is Python's own codec."""

    bos_id, eos_id = None, None

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Marked(Bytes):
    bos_id, eos_id = 1, 46


MODEL = dataclasses.replace(MODELS["gqa"], vocab=128)
PARAMS = params_of(MODEL, seed=1)
CONFIG = Generate(max_tokens=24, temperature=2.0)


def run(config, tokenizer, prompts=("The ", "a"), **more):
    return complete(config, MODEL, PARAMS, tokenizer, list(prompts), jax.random.key(0), **more)


def test_text_is_the_decoded_tokens_and_pieces_add_up():
    pieces = {0: [], 1: []}
    answers = run(CONFIG, Bytes(), emit=lambda row, piece: pieces[row].append(piece), every=5)
    plain = generate(CONFIG, MODEL, PARAMS, [list(b"The "), list(b"a")], jax.random.key(0))
    for row, answer in enumerate(answers):
        assert answer.tokens == tuple(plain.tokens[row])
        assert answer.text == bytes(answer.tokens).decode(errors="replace")
        assert "".join(pieces[row]) == answer.text
        assert len(pieces[row]) == 5
        assert answer.finish == "length"
        np.testing.assert_array_equal(answer.log_probs, plain.log_probs[row])


@evidence("J01", oracle="str.find on the unstopped text", code="llmjax.decode.text.complete")
@pytest.mark.parametrize("every", [1, 7])
def test_stop_strings_cut_the_text(evidence, every):
    """The text ends where the unstopped text first holds the string; the tokens end with the one that completed it."""
    free = run(CONFIG, Bytes())
    stop = free[0].text[9:12]
    pieces = []
    config = Generate(max_tokens=24, temperature=2.0, stop=(stop, "never there"))
    answers = run(config, Bytes(), every=every, emit=lambda row, piece: pieces.append(piece) if row == 0 else None)
    evidence.record(error=abs(len(answers[0].text) - free[0].text.find(stop)), tolerance=0)
    assert answers[0].text == free[0].text[: free[0].text.find(stop)]
    assert "".join(pieces) == answers[0].text
    assert answers[0].finish == "stop"
    assert answers[0].tokens == free[0].tokens[: free[0].text.find(stop) + 3]
    assert len(answers[0].log_probs) == len(answers[0].tokens)
    assert answers[1].text == free[1].text.partition(stop)[0]


def test_eos_ends_the_text_and_is_no_part_of_it():
    free = run(Generate(max_tokens=24, temperature=2.0, stop_at_eos=False), Marked())
    eos = free[0].tokens[6]
    tokenizer = Marked()
    tokenizer.eos_id = eos
    answers = run(CONFIG, tokenizer)
    at = free[0].tokens.index(eos)
    assert answers[0].finish == "eos"
    assert answers[0].tokens == free[0].tokens[: at + 1]
    assert answers[0].text == bytes(free[0].tokens[:at]).decode()


def test_an_empty_prompt_starts_from_bos_or_is_an_error():
    assert run(CONFIG, Marked(), prompts=[""])[0].tokens
    with pytest.raises(InputError, match=r"prompts\[1\] is empty and the tokenizer has no bos token"):
        run(CONFIG, Bytes(), prompts=["a", ""])


def test_unfinished_characters_and_stops_are_held_back():
    """A byte stream of several scripts: no piece ever has a broken character, and no piece holds a part of the stop."""
    text = "naïve 東京 🙂 end<stop>more"
    ids = list(text.encode())
    answer = Answer(Generate(stop=("<stop>",)), Bytes(), None)
    pieces = [answer.extend(ids[:count], False) for count in range(1, len(ids) + 1)]
    assert "".join(pieces) == "naïve 東京 🙂 end"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert answer.finish == "stop"
    assert bytes(answer.tokens).decode() == "naïve 東京 🙂 end<stop>"


def test_pieces_of_stops():
    assert held_back("abc", ("cd",)) == 2
    assert held_back("abc<", ("<end>", "x")) == 3
    assert held_back("abc", ()) == 3
    assert first_stop("abcabc", ("ca", "bc")) == 1
    assert first_stop("abc", ("x",)) is None
