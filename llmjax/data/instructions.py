"""Instructions and responses, one JSON object a line, with a loss on the responses alone.

A document is prompt and response, tokenised apart: the ids of a prompt are those that generation starts from, and no
token stands across the boundary. On disk the ids of a response are `vocab_size` higher than they are, so that a packing
may cut the stream anywhere and the mask of every piece is known from the piece alone.
"""

import json
import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from llmjax.config import InputError
from llmjax.data.codec import Codec
from llmjax.data.corpus import Corpus, write_token_shards
from llmjax.data.jsonl import json_text
from llmjax.data.reading import Reading, Split, digest
from llmjax.data.source import FileSource
from llmjax.data.splits import held_out

NO_INPUT = ("", "<noinput>")
"""What stands in a record's input where there is none (Wang et al. 2022, 2212.10560)."""


@dataclass(frozen=True)
class Template:
    """The prompt of a record: Alpaca's (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca).

    Braces in a record are text; those of a template itself are doubled, as `str.format` has it.
    """

    with_input: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    )
    """The prompt where there is an input."""
    without_input: str = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    )
    """The prompt where there is none."""

    def prompt(self, instruction: str, given: str = "") -> str:
        """The text before the response; `given` is the record's input."""
        if given.strip() in NO_INPUT:
            return self.without_input.format(instruction=instruction)
        return self.with_input.format(instruction=instruction, input=given)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Templates that leave out a part of the record, or name what no record has."""
        for field, wanted in (("with_input", ["input", "instruction"]), ("without_input", ["instruction"])):
            try:
                named = sorted(
                    name for _, name, _, _ in string.Formatter().parse(getattr(self, field)) if name is not None
                )
            except ValueError as error:
                yield field, f"is no template ({error}): write braces that are text twice"
                continue
            if named != wanted:
                yield field, f"must hold {' and '.join(f'{{{name}}}' for name in wanted)}, each once"


@dataclass(frozen=True)
class Instructions(FileSource):
    """Files of JSON objects with the fields instruction, output and, where the instruction has one, input.

    The targets that the loss counts are the response's tokens and the end of text after it. Records with one prompt lie
    on one side of the split. A record that is too long is left out whole: it would lose its end of text.
    """

    template: Template = Template()
    """How a record becomes a prompt."""
    longest: int = 512
    """Tokens that a record may have, its beginning of text counted; a longer one is a bad record. At most data.length,
    so that no row has a response without its prompt."""

    def read(self, file: Path, reading: Reading) -> Iterator[tuple[str, str]]:
        """Prompt and response of each line, as JSON text: where one ends must be known when they are tokenised."""
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file}:{number}"
                exchange = self.exchange(line, where, reading) if line.strip() else None
                if exchange is not None:
                    yield where, json.dumps(exchange)

    def exchange(self, line: bytes, where: str, reading: Reading) -> tuple[str, str] | None:
        """(prompt, response) of a record, or None after reporting what is wrong with it."""
        instruction = json_text(line, "instruction", where, reading)
        response = None if instruction is None else json_text(line, "output", where, reading)
        if instruction is None or response is None:
            return None
        given = json.loads(line).get("input") or ""
        if not isinstance(given, str):
            reading.bad(f"{where}: field 'input' holds a {type(given).__name__}, not a string")
        elif not instruction.strip() or not response.strip():
            reading.bad(f"{where}: the {'output' if instruction.strip() else 'instruction'} is empty")
        elif any("\ud800" <= character <= "\udfff" for character in instruction + given + response):
            reading.bad(f"{where}: the text holds half of a surrogate pair, which is not valid Unicode")
        else:
            return self.template.prompt(instruction, given), response
        return None

    def exchanges(self, split: Split, reading: Reading) -> Iterator[tuple[str, str, str]]:
        """(where, prompt, response) of each record of `split`."""
        for where, exchange in self.located(reading):
            prompt, response = json.loads(exchange)
            if held_out(prompt, self.holdout, self.fold) == (split == "validation"):
                yield where, prompt, response

    def documents(self, split: Split, reading: Reading) -> Iterator[str]:
        """Prompt and response of each record of `split`, one after the other."""
        for _, prompt, response in self.exchanges(split, reading):
            yield prompt + response

    def corpus(self, split: Split, codec: Codec, reading: Reading) -> "Responses":
        """The records of `split` as tokens, from the cache; tokenised when they are not there yet, or damaged.

        Raises:
            InputError: the split has no records.
        """
        key = digest("instructions", self.fingerprint(), split, codec.fingerprint, reading.on_error)
        folder = reading.cache / "tokens" / key
        try:
            return Responses(folder)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
        count = write_token_shards(
            folder,
            self.marked(split, codec, reading),
            vocab_size=2 * codec.vocab_size,
            bos_id=codec.bos_id,
            eos_id=codec.eos_id,
            skipped=lambda: reading.skipped,
        )
        if not count:
            raise InputError(f"{self.label()} has no records in its {split} split: {self.remedy(split)}")
        return Responses(folder)

    def marked(self, split: Split, codec: Codec, reading: Reading) -> Iterator[list[int]]:
        """The ids of each record of `split`, those of its response `vocab_size` higher."""
        for where, prompt, response in self.exchanges(split, reading):
            ids = [*codec.encode(prompt), *(i + codec.vocab_size for i in codec.encode(response))]
            if 1 + len(ids) > self.longest:
                reading.bad(f"{where}: the record has {1 + len(ids)} tokens, more than longest={self.longest}")
            else:
                yield ids

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        yield from super().problems()
        if self.longest < 2:
            yield "longest", "leaves no room for a record: use for example 512"


class Responses(Corpus):
    """A stream in which the ids of responses are `vocab_size` higher."""

    def __init__(self, path: Path) -> None:
        """Open the corpus in folder `path`; raises InputError as `Corpus` does."""
        super().__init__(path)
        self.vocab_size //= 2

    def read(self, start: int, stop: int) -> Int32[np.ndarray, "stop-start"]:
        """Tokens `start` to `stop` of the stream."""
        return super().read(start, stop) % self.vocab_size

    def loss_mask(self, start: int, stop: int) -> Float32[np.ndarray, "stop-start"]:
        """1 where what follows an input is a response's token, or the end of its record, else 0."""
        places = np.arange(start + 1, stop + 1)
        ends = self.starts[np.searchsorted(self.starts, places)] == places
        return (ends | (super().read(start + 1, stop + 1) >= self.vocab_size)).astype(np.float32)
