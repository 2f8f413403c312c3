"""Byte-pair encoding trained on the source: Sennrich et al. 2015 (arXiv:1508.07909), over bytes as in GPT-2 (2019)."""

import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.library_codec import LibraryCodec
from llmjax.data.reading import Reading, digest
from llmjax.data.source import Source
from llmjax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class BPE(Tokenizer):
    """Byte-level BPE trained on the training split by the `tokenizers` library, cached by content hash; loses nothing.

    The last id is the end-of-text token. It is no string of the library's vocabulary, so no text can contain it.
    Where the text runs out of pairs to merge, the ids before it stay unused.
    """

    vocab_size: int = 2048
    """Number of ids: 256 bytes, the merges, and the end-of-text token."""

    def resolve(self, source: Source, reading: Reading) -> Codec:
        """The tokenizer trained on the training documents of `source`; raises InputError where there are none."""
        import tokenizers

        key = digest("bpe", source.fingerprint(), self.vocab_size, reading.on_error, tokenizers.__version__)
        path = reading.cache / "bpe" / f"{key}.json"
        if not path.exists():
            documents = source.documents("train", reading.again())
            first = next(documents, None)
            if first is None:
                raise InputError(
                    f"{source.label()} has no training documents to train BPE on: {source.remedy('train')}"
                )
            _save(train(itertools.chain([first], documents), self.vocab_size - 1), path)
        eos_id = self.vocab_size - 1
        return LibraryCodec(tokenizers.Tokenizer.from_file(str(path)), eos_id, eos_id, self.vocab_size)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        if self.vocab_size < 257:
            yield "vocab_size", "is too small: use at least 257 (256 bytes and the end of text)"


def train(documents: Iterator[str], vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` with at most `vocab_size` ids: 256 bytes, then merges in order of frequency.

    Words are cut by GPT-2's pattern. Equally frequent pairs are merged in the order of their ids, so training on the
    same text gives the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _save(tokenizer: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    tokenizer.save(partial)
    Path(partial).replace(path)
