"""Bytes as tokens: 256 symbols and one end-of-text token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmjax.data.codec import Codec
from llmjax.data.reading import Reading
from llmjax.data.source import Source
from llmjax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """The UTF-8 bytes of the text: ids 0 to 255, and 256 between documents. Needs no training and loses nothing."""

    def resolve(self, source: Source, reading: Reading) -> Codec:
        """The tokenizer ready for use."""
        return ByteCodec()


class ByteCodec(Codec):
    """Ids are bytes; 256 is beginning and end of text."""

    vocab_size = 257
    bos_id = eos_id = 256
    fingerprint = "bytes"

    def __init__(self) -> None:
        self.token_bytes = np.ones(257, np.int32)
        self.token_bytes[256] = 0

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; the special token stands for nothing, broken UTF-8 becomes U+FFFD."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")
