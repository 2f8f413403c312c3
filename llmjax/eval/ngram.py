"""The n-gram model: a table of counts, the oldest language model, as a yardstick and as the optimum on Markov data.

    p_n(w | h) = (c(h w) + k p_{n-1}(w | h')) / (c(h) + k),    p_0(w) = 1 / vocab,
h the last n - 1 symbols, h' the same without the oldest one, c(h w) how often w followed h in the training text, and
c(h) = sum_w c(h w), so that the sum over w is one for every h. Counting is Shannon's (1948). The back-off is the mean
of a Dirichlet posterior, its prior of weight k around p_{n-1}: MacKay and Peto 1995 ("A hierarchical Dirichlet language
model", Natural Language Engineering 1(3)), who have two levels and fit weight and mean of the prior to the text; here k
is given, and the mean is the estimate of one order less. k = 0 is maximum likelihood, undefined after unseen histories.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from llmjax.data import Data
from llmjax.eval.compressors import LIMIT, text

ORDER = 6
"""Of the model of bytes: five bytes are the history."""
STRENGTH = 24.0
"""k of the model of bytes: the best of 8 to 64 on the last tenth of the demo's training text, given the rest."""


@dataclass(frozen=True)
class NGram:
    """The n-grams of a training text. An n-gram is the number that its symbols spell in base `vocab`."""

    vocab: int
    strength: float
    sorted_grams: tuple[Int[np.ndarray, " grams"], ...]
    """for n = 1 to the order: all n-grams of the text in ascending order, as often as they occur"""

    def log_probs(self, symbols: Int[np.ndarray, " length"]) -> Float[np.ndarray, " length"]:
        """log p(w_i | w_{i-order+1} ... w_{i-1}) in nats, float64; the first symbols have the histories that there are.

        For k = 0 -inf where the symbol was never seen after this history, NaN where the history was never seen.
        Raises ValueError for symbols outside the vocabulary.
        """
        p = np.full(len(symbols), 1 / self.vocab)
        with np.errstate(invalid="ignore", divide="ignore"):
            for n, grams in enumerate(self.sorted_grams, 1):
                # Searched in ascending order, megabytes of n-grams are read once; in the text's, again and again.
                asked, place = np.unique(spelled(symbols, n, self.vocab), return_inverse=True)
                history = asked // self.vocab * self.vocab
                seen, followed = between(grams, asked, asked + 1), between(grams, history, history + self.vocab)
                p[n - 1 :] = (seen[place] + self.strength * p[n - 1 :]) / (followed[place] + self.strength)
            return np.log(p)


def count(symbols: Int[np.ndarray, " length"], order: int, vocab: int, strength: float) -> NGram:
    """The model of order `order` >= 1 with k = `strength` >= 0, from a text of ids below `vocab`.

    Raises ValueError for other values, and where vocab^order has no room in 63 bits.
    """
    if order < 1 or strength < 0 or vocab < 1 or vocab**order >= 2**63:
        raise ValueError(f"{order=}, {strength=} or {vocab=} is out of range: at least 1, 0, 1, and vocab^order < 2^63")
    return NGram(vocab, strength, tuple(np.sort(spelled(symbols, n, vocab)) for n in range(1, order + 1)))


def spelled(symbols: Int[np.ndarray, " length"], n: int, vocab: int) -> Int[np.ndarray, " grams"]:
    """All n-grams of a text in its order, `[length - n + 1]`; ValueError for symbols that are not in 0 .. vocab - 1."""
    if len(symbols) and not 0 <= symbols.min() <= symbols.max() < vocab:
        raise ValueError(f"symbols from {symbols.min()} to {symbols.max()} are not all below vocab={vocab}")
    grams = np.zeros(max(len(symbols) - n + 1, 0), np.int64)
    for start in range(n):
        grams = grams * vocab + symbols[start : start + len(grams)]
    return grams


def between(
    grams: Int[np.ndarray, " grams"], low: Int[np.ndarray, " asked"], high: Int[np.ndarray, " asked"]
) -> Int[np.ndarray, " asked"]:
    """How many of the ascending `grams` lie in low <= gram < high."""
    return np.searchsorted(grams, high) - np.searchsorted(grams, low)


def bits_per_byte(held_out: bytes, training: bytes, order: int = ORDER, strength: float = STRENGTH) -> float:
    """Bits a byte of the held-out text under the counts of the training text; ValueError where nothing is held out."""
    if not held_out:
        raise ValueError("there are no held-out bytes to predict")
    seen, asked = (np.frombuffer(part, np.uint8).astype(np.int64) for part in (training, held_out))
    return float(-count(seen, order, 256, strength).log_probs(asked).mean() / math.log(2))


def compare(data: Data, limit: int = LIMIT) -> float | None:
    """`bits_per_byte` on the texts of `data`; None where compressors are not compared either."""
    held_out, training = text(data, "validation", limit), text(data, "train", limit)
    return bits_per_byte(held_out, training) if held_out and training is not None else None
