"""Pictures of coloured shapes with their class and a caption, every one drawn from its own address."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from llmjax.data.codec import Codec
from llmjax.data.dataset import Batches, Dataset
from llmjax.data.packing import Batch, empty_batch
from llmjax.data.reading import digest
from llmjax.data.visual_dialogue import dialogue

COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.9, 0.9, 0.1),
    "purple": (0.7, 0.1, 0.8),
    "white": (1.0, 1.0, 1.0),
}
FORMS = ("disc", "square", "triangle", "cross", "ring", "diamond")
"""The classes."""
PLACES = ("northwest", "northeast", "southwest", "southeast")
WORDS = ("padding", "end", "image", "begin", *COLOURS, *FORMS, *PLACES)
"""Token ids in order: the end of a caption is 1, an image's placeholder 2."""
CAPTION = 5
"""Tokens of a caption: begin, colour, form, place, end."""


@dataclass(frozen=True, kw_only=True)
class Shapes(Dataset):
    """One shape on dark noise, of random colour, form, quarter, place and size.

    Batches have `images` `[batch, side, side, 3]` float32 of mean about 0, and `labels` `[batch, 1]` int32, the form.
    Their `tokens` are as many image placeholders as `visual_tokens` says, then `begin colour form place end`; the loss
    mask counts the caption's words as targets. What is left of `length` is padding.
    """

    length: int = CAPTION
    """Tokens in a row."""
    side: int = 32
    """Pixels along each edge."""
    noise: float = 0.1
    """Standard deviation of the noise on each pixel, whose values lie between 0 and 1."""
    visual_tokens: int = 0
    """Image placeholders before each caption: as many as a LLaVA has, else 0."""
    eval_rows: int = 512
    """Held-out pictures, a multiple of batch_size; they are drawn from addresses that training never uses."""

    def build(self, seed: int, cache_dir: str | Path | None = None) -> Batches:
        """Random access to the batches; nothing is read or kept."""
        return Pictures(self, seed)

    def vocab(self) -> int:
        """Words, marks and padding."""
        return len(WORDS)

    def empty(self, rows: int) -> Batch:
        """A batch of so many rows that hold nothing."""
        images = np.zeros((rows, self.side, self.side, 3), np.float32)
        return super().empty(rows) | {"images": images, "labels": np.zeros((rows, 1), np.int32)}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Rows without room, pictures too small for their shapes."""
        yield from super().problems()
        least = self.visual_tokens + CAPTION - 1
        if self.visual_tokens < 0:
            yield "visual_tokens", "must not be negative"
        elif self.length < least + 1:
            yield "length", f"has no room for {self.visual_tokens} visual tokens and a caption: use {least + 1}"
        if self.side < 16:
            yield "side", "is too small to tell shapes apart: use at least 16"
        if self.noise < 0:
            yield "noise", "must not be negative"
        if self.eval_rows < 1 or self.batch_size < 1 or self.eval_rows % self.batch_size:
            yield "eval_rows", f"must be a multiple of batch_size={self.batch_size}: contrastive batches are full"


class Pictures(Batches):
    """The pictures by number."""

    def __init__(self, config: Shapes, seed: int) -> None:
        self.config, self.tokenizer, self._seed = config, Words(), seed
        self.fingerprint = digest("shapes", asdict(config))

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Training pictures `step * batch_size + i`, i < batch_size, or some of them."""
        wanted = range(self.config.batch_size)[rows or slice(None)]
        return self._rows(0, [step * self.config.batch_size + row for row in wanted])

    def eval_batches(self, max_batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """The held-out pictures in order."""
        size = self.config.batch_size
        for start in range(0, self.config.eval_rows, size)[:max_batches]:
            yield self._rows(1, list(range(start, start + size)[rows or slice(None)]))

    def _rows(self, split: int, numbers: Sequence[int]) -> Batch:
        c = self.config
        batch = empty_batch(len(numbers), c.length)
        batch["images"] = np.zeros((len(numbers), c.side, c.side, 3), np.float32)
        batch["labels"] = np.zeros((len(numbers), 1), np.int32)
        for slot, number in enumerate(numbers):
            random = np.random.default_rng((self._seed, split, number))
            colour, form, place = (int(random.integers(n)) for n in (len(COLOURS), len(FORMS), len(PLACES)))
            batch["images"][slot] = picture(colour, form, place, c.side, c.noise, random)
            batch["labels"][slot] = form
            for name, row in self._row(colour, form, place).items():
                batch[name][slot] = row[0]
        return batch

    def _row(self, colour: int, form: int, place: int) -> Batch:
        """Placeholders and caption; the end token stays in the row, its target is padding."""
        words = [tuple(COLOURS)[colour], FORMS[form], PLACES[place], "end"]
        begin = [2] * self.config.visual_tokens + [WORDS.index("begin")]
        caption = [WORDS.index(word) for word in words]
        return dialogue([(begin, False), (caption, True), ([0], False)], self.config.length)


def picture(
    colour: int, form: int, place: int, side: int, noise: float, random: np.random.Generator
) -> Float[np.ndarray, "side side 3"]:
    """A shape of radius side / 6 to side / 4 in a quarter of the picture, on noise; values less 0.25."""
    radius = side * random.uniform(1 / 6, 1 / 4)
    centre = side * (0.25 + 0.5 * np.array([place // 2, place % 2])) + random.uniform(-0.05, 0.05, 2) * side
    y, x = (np.mgrid[:side, :side] + 0.5 - centre[:, None, None]) / radius
    inside = {
        "disc": x**2 + y**2 < 1,
        "square": np.maximum(abs(x), abs(y)) < 0.85,
        "triangle": (y < 0.7) & (y > 2 * abs(x) - 1),
        "cross": (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
        "ring": abs(np.hypot(x, y) - 0.75) < 0.25,
        "diamond": abs(x) + abs(y) < 1.1,
    }[FORMS[form]]
    image = random.normal(0.1, noise, (side, side, 3))
    image[inside] += tuple(COLOURS.values())[colour]
    return np.clip(image, 0, 1) - 0.25


class Words(Codec):
    """Captions as words; a word counts as one byte."""

    def __init__(self) -> None:
        self.vocab_size, self.bos_id, self.eos_id = len(WORDS), WORDS.index("begin"), WORDS.index("end")
        self.token_bytes = np.ones(len(WORDS), np.int32)
        self.fingerprint = digest("words", WORDS)

    def encode(self, text: str) -> list[int]:
        """The ids of the words in `text`; raises ValueError for others."""
        return [WORDS.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """The words, with spaces between them."""
        return " ".join(WORDS[i] for i in ids)
