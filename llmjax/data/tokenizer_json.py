"""Any tokenizer saved as `tokenizer.json` by the `tokenizers` library (GPT-2, LLaMA 3, Qwen, Gemma, BERT, ...)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.library_codec import LibraryCodec
from llmjax.data.reading import Reading
from llmjax.data.source import Source
from llmjax.data.tokenizer import Tokenizer

END = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
BEGIN = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")


@dataclass(frozen=True)
class TokenizerJson(Tokenizer):
    """A tokenizer from its `tokenizer.json`. Ids are the library's; special tokens in a text are read as plain text."""

    path: str = ""
    """The file."""
    eos: str = ""
    """The end-of-text token; empty: the usual names are tried."""
    bos: str = ""
    """The token before every document; empty: the usual names are tried, then the end-of-text token is taken."""

    def resolve(self, source: Source, reading: Reading) -> Codec:
        """The tokenizer ready for use. Raises InputError where the file is no tokenizer or lacks the tokens named."""
        from tokenizers import Tokenizer as Library

        file = Path(self.path).expanduser()
        if not file.is_file():
            raise InputError(f"{self.path!r}: there is no such file: name a tokenizer.json")
        try:
            tokenizer = Library.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: this is no tokenizer.json ({str(error).splitlines()[0]})") from error
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        eos_id = _find(vocabulary, self.eos, END)
        if eos_id is None:
            raise InputError(f"{file}: there is no token {self.eos or ' or '.join(END)!r}: name one as eos")
        bos_id = _find(vocabulary, self.bos, BEGIN)
        if bos_id is None and self.bos:
            raise InputError(f"{file}: there is no token {self.bos!r}: name another as bos")
        return LibraryCodec(tokenizer, eos_id if bos_id is None else bos_id, eos_id)


def _find(vocabulary: dict[str, int], name: str, usual: Sequence[str]) -> int | None:
    return next((vocabulary[token] for token in ([name] if name else usual) if token in vocabulary), None)
