"""What a tokenizer config resolves to: text to token ids and back."""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32


class Codec(abc.ABC):
    """A tokenizer ready for use.

    Attributes:
        vocab_size: number of ids; all ids are below it.
        bos_id: stands before every document; the first token of a document is predicted from it.
        eos_id: the target after the last token of a document; often the same id as `bos_id`.
        token_bytes: UTF-8 bytes each id stands for, 0 for special tokens: over `encode(text)` they sum to
            `len(text.encode())`.
        fingerprint: content hash.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    token_bytes: Int32[np.ndarray, "vocab"]
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in the text are read as plain text, none is added."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens stand for nothing, broken UTF-8 becomes U+FFFD."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]
