"""A tokenizer of the `tokenizers` library behind our interface."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.reading import digest

END_OF_TEXT = "<|endoftext|>"
"""what the end of text is called in files, where a tokenizer has no name for it"""


class LibraryCodec(Codec):
    """Wraps a `tokenizers.Tokenizer`. Ids beyond its vocabulary, up to `vocab_size`, are end of text or unused."""

    def __init__(self, tokenizer: Any, bos_id: int, eos_id: int, vocab_size: int | None = None) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # a document cannot smuggle in special tokens
        self._tokenizer = tokenizer
        self._ids = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id = bos_id, eos_id
        self.vocab_size = vocab_size or self._ids
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        self.token_bytes[: self._ids] = token_bytes(tokenizer, self._ids)
        self.token_bytes[[bos_id, eos_id]] = 0
        self.fingerprint = digest(tokenizer.to_str(), bos_id, eos_id, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in the text are read as plain text, none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens stand for nothing, broken UTF-8 becomes U+FFFD."""
        known = [int(i) for i in ids if i < self._ids and i not in (self.bos_id, self.eos_id)]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json, the end of text a token of its own as it is here.

        Raises InputError where the vocabulary ends before the id of the end of text: no file can say that.
        """
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        if tokenizer.id_to_token(self.eos_id) is None:
            tokenizer.add_special_tokens([END_OF_TEXT])
            if tokenizer.token_to_id(END_OF_TEXT) != self.eos_id:
                raise InputError(f"the tokenizer has {self._ids} ids, and its end of text is {self.eos_id}")
        return tokenizer.to_str(pretty=True)


def token_bytes(tokenizer: Any, size: int) -> Int32[np.ndarray, "size"]:
    """UTF-8 bytes that each id of a `tokenizers.Tokenizer` stands for; 0 for special tokens.

    Exact for byte-level vocabularies (each character of a token is one byte) without a prefix space, and for byte
    fallback ("<0x0A>"). For SentencePiece ("▁" is a space) and WordPiece ("##" continues a word) exact up to what
    their normalisers change and to the space they put before the text.
    """
    spec = json.loads(tokenizer.to_str())
    stages = [stage for name in ("pre_tokenizer", "decoder") for stage in _stages(spec.get(name))]
    byte_level = any(stage.get("type") == "ByteLevel" for stage in stages)
    counts = np.zeros(size, np.int32)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        counts[index] = len(token) if byte_level else _text_bytes(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        counts[index] = 0 if added.special else len(added.content.encode())
    return counts


def _stages(stage: dict | None) -> list[dict]:
    """A stage and those of the sequence it may be."""
    inner = [*stage.get("pretokenizers", []), *stage.get("decoders", [])] if stage else []
    return [stage, *(found for part in inner for found in _stages(part))] if stage else []


def _text_bytes(token: str) -> int:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode())
