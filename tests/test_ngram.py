"""The n-gram model against a count by hand, the laws of probability, and the entropy of Markov chains."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from llmjax.data import Data, InMemory, TokenShards
from llmjax.eval import compressors, ngram
from tests.evidence import evidence

CODE = "llmjax.eval.ngram"
TEXT = np.random.default_rng(0).integers(3, size=60) % np.arange(1, 61).clip(max=3)


def by_hand(text, order, vocab, strength, history, symbol):
    """The equation, one order after the other, from strings that are counted one by one."""
    p = 1 / vocab
    for n in range(1, min(order, len(history) + 1) + 1):
        h = tuple(history[len(history) - n + 1 :])
        grams = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        followed = sum(grams[(*h, w)] for w in range(vocab))
        if followed + strength == 0:
            return math.nan
        p = (grams[(*h, symbol)] + strength * p) / (followed + strength)
    return p


@evidence("D15", oracle="n-grams counted one by one", code=CODE)
@pytest.mark.parametrize(("order", "strength"), [(1, 0.5), (2, 2.0), (4, 3.0), (3, 0.0)])
def test_probabilities_are_those_of_a_count_by_hand(order, strength, evidence):
    """On text with histories that were never seen. float64 sums and quotients: 1e-14."""
    asked = np.random.default_rng(1).integers(4, size=80)
    text = [int(w) for w in TEXT]
    found = np.exp(ngram.count(TEXT, order, 4, strength).log_probs(asked))
    expected = [by_hand(text, order, 4, strength, asked[max(i - order + 1, 0) : i], w) for i, w in enumerate(asked)]
    assert np.isnan(expected).any() == (strength == 0), "only maximum likelihood is undefined after unseen histories"
    evidence.record(np.abs(np.nan_to_num(found, nan=-1) - np.nan_to_num(expected, nan=-1)).max(), 1e-14)


@evidence("D15", oracle="probabilities sum to one", code=CODE)
def test_every_history_has_one_distribution(evidence):
    """Over all 4^3 histories of an order-4 model, seen and unseen, the last of the text too. float64 sums: 1e-14."""
    model = ngram.count(TEXT, 4, 4, 0.7)
    sums = [
        sum(np.exp(model.log_probs(np.array([*history, w]))[-1]) for w in range(4))
        for history in itertools.product(range(4), repeat=3)
    ]
    evidence.record(np.abs(np.array(sums) - 1).max(), 1e-14)


def markov(states, length, random):
    """A chain whose rows hold the same numbers in other orders, those numbers, and a text of it.

    The surprise at each step then has the same distribution whatever came before: surprises are independent.
    """
    row = random.dirichlet(np.full(states, 0.6)) * 0.95 + 0.05 / states
    chain = np.stack([random.permutation(row) for _ in range(states)])
    text, draws, steps = [0], random.random(length - 1), np.cumsum(chain, axis=1)[:, :-1]
    for draw in draws:
        text.append(int((draw > steps[text[-1]]).sum()))
    return chain, row, np.array(text)


@evidence("D15", oracle="transition matrix of a Markov chain", code=CODE)
def test_maximum_likelihood_converges_to_the_transition_matrix(evidence):
    """Each entry is a mean of N_i draws: within 4.5 standard deviations sqrt(P (1 - P) / N_i) of the truth.

    16 entries leave a chance of 1e-4 to miss that. The law also asks that the error shrinks with the text.
    """
    chain, _, text = markov(4, 40000, np.random.default_rng(2))
    pairs = np.array(list(itertools.product(range(4), repeat=2)))

    def table(length):
        model = ngram.count(text[:length], 2, 4, 0.0)
        return np.exp([model.log_probs(pair)[-1] for pair in pairs]).reshape(4, 4)

    deviation = np.sqrt(chain * (1 - chain) / np.bincount(text[:-1], minlength=4)[:, None])
    assert np.abs(table(40000) - chain).max() < np.abs(table(400) - chain).max() / 3
    evidence.record((np.abs(table(40000) - chain) / deviation).max(), 4.5)


@evidence("D15", oracle="entropy rate of a Markov chain (closed form)", code=CODE)
@pytest.mark.parametrize("order", [2, 3])
def test_perplexity_on_a_markov_chain_is_that_of_its_entropy_rate(order, evidence):
    """Mean of independent surprises: 4 standard deviations, and V^(order - 1) (V - 1) / N nats for the counts.

    The latter is twice what estimating so many free probabilities costs in expectation.
    """
    states, length = 5, 40000
    _, row, text = markov(states, 2 * length, np.random.default_rng(3))
    entropy = -(row * np.log(row)).sum()
    spread = math.sqrt((row * (np.log(row) + entropy) ** 2).sum() / length)
    surprise = -ngram.count(text[:length], order, states, 1.0).log_probs(text[length:]).mean()
    assert -ngram.count(text[:length], 1, states, 1.0).log_probs(text[length:]).mean() > entropy + 0.1
    evidence.record(abs(surprise - entropy), 4 * spread + states ** (order - 1) * (states - 1) / length)


def test_bits_per_byte_is_beside_the_compressors(tmp_path):
    """Nothing counted is 8 bits a byte; text seen before costs little; no figure where compressors have none."""
    text = b"for while yield lambda " * 40
    assert ngram.bits_per_byte(text, b"") == pytest.approx(8, abs=1e-12)
    assert ngram.bits_per_byte(text, text) < 0.5 * ngram.bits_per_byte(text[::-1], text)
    with pytest.raises(ValueError, match="no held-out bytes"):
        ngram.bits_per_byte(b"", text)
    texts = tuple(f"document {n}: ünïcode {n * n}" for n in range(30))
    data = Data(source=InMemory(texts=texts, holdout=0.3), cache_dir=str(tmp_path))
    held_out, training = compressors.text(data, "validation"), compressors.text(data, "train")
    assert ngram.compare(data) == ngram.bits_per_byte(held_out, training) < 8
    assert ngram.compare(data, limit=len(held_out) - 1) is None
    assert ngram.compare(Data(source=TokenShards(), cache_dir=str(tmp_path))) is None


def test_what_cannot_be_counted_is_refused():
    for order, vocab, strength in ((0, 4, 1.0), (2, 0, 1.0), (2, 4, -1.0), (8, 256, 1.0)):
        with pytest.raises(ValueError, match="out of range"):
            ngram.count(TEXT, order, vocab, strength)
    for symbols in (TEXT - 1, TEXT):
        with pytest.raises(ValueError, match="not all below vocab=2"):
            ngram.count(symbols, 1, 2, 1.0)
