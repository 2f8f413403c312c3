"""Documents that are tokens already: memory-mapped shards written by `write_token_shards`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.corpus import Corpus
from llmjax.data.reading import Reading, Split, digest
from llmjax.data.source import Source

SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class TokenShards(Source):
    """A folder with a corpus of token shards in `train` and, where there is held-out data, in `validation`."""

    path: str = ""
    """The folder."""

    def corpus(self, split: Split, codec: Codec, reading: Reading) -> Corpus:
        """The tokens of `split`. Raises InputError where they are missing or were made with other special tokens."""
        corpus = Corpus(self._folder(split))
        theirs = (corpus.vocab_size, corpus.bos_id, corpus.eos_id)
        if theirs != (codec.vocab_size, codec.bos_id, codec.eos_id):
            raise InputError(
                f"{corpus.path} was written with vocab_size, bos_id, eos_id = {theirs}, "
                f"the tokenizer has {(codec.vocab_size, codec.bos_id, codec.eos_id)}: use the one it was written with"
            )
        return corpus

    def documents(self, split: Split, reading: Reading) -> Iterator[str]:
        """Raises InputError: the text is not there any more."""
        raise InputError(f"{self.path}: token shards hold no text: name a tokenizer that needs no training")

    def has(self, split: Split) -> bool:
        """Whether the split's folder is there; training is always meant to be."""
        return split == "train" or self._folder(split).exists()

    def fingerprint(self) -> str:
        """Hash of what the splits' meta.json files say, which hold a hash of every shard."""
        return digest("token_shards", [self._read_meta(split) for split in SPLITS if self.has(split)])

    def _read_meta(self, split: Split) -> str:
        try:
            return (self._folder(split) / "meta.json").read_text()
        except OSError as error:
            raise InputError(f"{self._folder(split)} is no token folder: write it with write_token_shards") from error

    def _folder(self, split: Split) -> Path:
        return Path(self.path).expanduser() / split

    def label(self) -> str:
        """The source in a word or two, for messages."""
        return f"TokenShards {self.path}"
