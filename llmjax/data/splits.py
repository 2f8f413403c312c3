"""Hash-stable splits: a document's side depends on its text alone, so reordering or adding documents moves nothing."""

import hashlib


def unit_hash(text: str) -> float:
    """A number in [0, 1) that is a pure function of `text` and uniform over texts (BLAKE2b, 53 bits)."""
    word = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(word, "big") >> 11) / 2**53


def held_out(text: str, holdout: float, fold: int = 0) -> bool:
    """Whether `text` is in the held-out part: its hash lies in [fold * holdout, (fold + 1) * holdout).

    With `holdout = 1 / k` the folds 0 to k-1 are the parts of a k-fold cross-validation: disjoint and exhaustive.
    """
    return fold * holdout <= unit_hash(text) < (fold + 1) * holdout
