"""The base class of tokenizer configs."""

import abc
from dataclasses import dataclass

from llmjax.data.codec import Codec
from llmjax.data.reading import Reading
from llmjax.data.source import Source


@dataclass(frozen=True)
class Tokenizer(abc.ABC):
    """Base of all tokenizers: a recipe that becomes a `Codec`."""

    @abc.abstractmethod
    def resolve(self, source: Source, reading: Reading) -> Codec:
        """The tokenizer ready for use; one that is trained is trained on the training split of `source`, once."""
