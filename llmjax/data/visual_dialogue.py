"""Rows of visual instructions: image placeholders made as long as the image, and a loss on answers alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from llmjax.config import InputError
from llmjax.data.packing import Batch, empty_batch


def expand(tokens: Sequence[int], image_token: int, visual_tokens: int) -> list[int]:
    """The tokens with `visual_tokens` copies in place of each image token: one for each vector of an image."""
    copies = [[token] * (visual_tokens if token == image_token else 1) for token in tokens]
    return [token for group in copies for token in group]


def dialogue(turns: Sequence[tuple[Sequence[int], bool]], length: int) -> Batch:
    """One row `[1, length]` of turns (tokens, whether they are an answer): targets are the next tokens.

    `loss_mask` is 1 where the target is an answer's token and 0 elsewhere: the model is not trained to ask, nor to
    continue an image (Liu et al. 2023, 2304.08485, section 4.2). Raises InputError where the turns are too long.
    """
    tokens = [token for turn, _ in turns for token in turn]
    answers = [answer for turn, answer in turns for _ in turn]
    count = len(tokens) - 1
    if not 1 <= count <= length:
        raise InputError(f"a dialogue of {len(tokens)} tokens does not fit a row: it needs 2 to {length + 1}")
    batch = empty_batch(1, length)
    batch["tokens"][0, :count], batch["targets"][0, :count] = tokens[:-1], tokens[1:]
    batch["loss_mask"][0, :count] = answers[1:]
    batch["positions"][0, :count], batch["segment_ids"][0, :count] = np.arange(count), 1
    batch["target_bytes"][0, :count] = 1
    return batch


def check_image_tokens(tokens: Int[np.ndarray, "batch length"], image_token: int, visual_tokens: int) -> None:
    """Raise InputError where a row has image tokens, but not as many as its image has vectors."""
    counts = (np.asarray(tokens) == image_token).sum(axis=1)
    for row in np.flatnonzero((counts != 0) & (counts != visual_tokens)):
        raise InputError(f"row {row} has {counts[row]} image tokens, and its image has {visual_tokens} vectors")
