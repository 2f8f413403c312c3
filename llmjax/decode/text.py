"""Generation on text: tokenizer in, tokenizer out, stop strings, and pieces of text as they come."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from llmjax.config import InputError
from llmjax.decode.config import Generate
from llmjax.decode.generate import stream
from llmjax.nn.model import Model, Params


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """Token that begins a document, if any."""

    @property
    def eos_id(self) -> int | None:
        """Token that ends a document, if any."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt's answer. `text` ends before a stop string or eos token; `tokens` include what completed it."""

    text: str
    tokens: tuple[int, ...]
    log_probs: Float[np.ndarray, "length"]
    model_log_probs: Float[np.ndarray, "length"]
    finish: str
    """"eos", "stop" (a stop string) or "length" (max_tokens)"""


def complete(
    config: Generate,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    key: PRNGKeyArray | None = None,
    emit: Callable[[int, str], None] | None = None,
    every: int = 8,
) -> list[Completion]:
    """Continue every prompt. `emit(row, piece)` is called with new text as it is certain, about each `every` tokens.

    The pieces of a row add up to its text. Prompts start with the tokenizer's bos token where it has one. Raises
    InputError for an empty prompt where it has none, and for prompts that the model or the cache has no room for.
    """
    eos = tokenizer.eos_id if config.stop_at_eos else None
    stop_ids = () if eos is None else (eos,)
    ids = [encoded(tokenizer, row, prompt) for row, prompt in enumerate(prompts)]
    answers = [Answer(config, tokenizer, eos) for _ in prompts]
    watched = emit is not None or config.stop
    for result in stream(config, model, params, ids, key, stop_ids, every if watched else config.max_tokens):
        for row, answer in enumerate(answers):
            length = result.lengths[row]
            piece = answer.extend(result.tokens[row, :length].tolist(), length == config.max_tokens)
            if emit is not None and piece:
                emit(row, piece)
        if all(answer.finish for answer in answers):
            break
    return [answer.completion(result.log_probs[row], result.model_log_probs[row]) for row, answer in enumerate(answers)]


def encoded(tokenizer: Tokenizer, row: int, prompt: str) -> list[int]:
    """Token ids of a prompt, after the bos token where there is one."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = bos + list(tokenizer.encode(prompt))
    if not ids:
        raise InputError(f"prompts[{row}] is empty and the tokenizer has no bos token to begin with: give some text")
    return ids


class Answer:
    """The text of one row while it grows: cut at stop strings, handed out only as far as it is certain."""

    def __init__(self, config: Generate, tokenizer: Tokenizer, eos: int | None) -> None:
        """An empty answer; `eos` is the token that ends it, or None."""
        self.stop, self.tokenizer, self.eos = config.stop, tokenizer, eos
        self.tokens: list[int] = []
        self.text, self.emitted, self.finish = "", 0, ""

    def extend(self, tokens: list[int], last: bool) -> str:
        """Take all tokens so far, and return the new text that later tokens cannot change."""
        if self.finish:
            return ""
        known, self.tokens = len(self.tokens), tokens
        ended = tokens[-1:] == [self.eos]
        body = tokens[:-1] if ended else tokens
        self.text = self.tokenizer.decode(body)
        self.finish = "eos" if ended else "length" if last else ""
        cut = first_stop(self.text, self.stop)
        if cut is not None:
            self.finish = "stop"
            self.tokens = self.completing(body, known)
            self.text = self.text[:cut]
        certain = len(self.text) if self.finish else held_back(self.text, self.stop)
        piece, self.emitted = self.text[self.emitted : certain], max(self.emitted, certain)
        return piece

    def completing(self, tokens: list[int], known: int) -> list[int]:
        """The fewest tokens whose text holds a stop string; the first `known` do not."""
        counts = range(known + 1, len(tokens))
        holds = (n for n in counts if first_stop(self.tokenizer.decode(tokens[:n]), self.stop) is not None)
        return tokens[: next(holds, len(tokens))]

    def completion(self, log_probs: np.ndarray, model_log_probs: np.ndarray) -> Completion:
        """The finished answer with its tokens' log-probabilities."""
        count = len(self.tokens)
        return Completion(self.text, tuple(self.tokens), log_probs[:count], model_log_probs[:count], self.finish)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins in `text`, or None."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How much of `text` is certain: not an unfinished character at the end, not the beginning of a stop string."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return len(text) - max(begun, default=0)
