"""How text is generated: the experiment's `generate` node."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Generate:
    """Sampling, stopping and the cache. Processors run in the order of the fields, as in `llmjax.decode.samplers`."""

    prompt: str = "The "
    """text that is continued where the caller gives none"""
    max_tokens: int = 128
    """most tokens generated for a prompt"""
    min_tokens: int = 0
    """tokens generated before a stop token may appear"""
    repetition_penalty: float = 1.0
    """logits of tokens that stand in the text so far are divided (or, negative, multiplied) by it; 1 is off"""
    no_repeat_ngram: int = 0
    """no run of this many tokens occurs twice in prompt and answer; 0 is off"""
    temperature: float = 1.0
    """logits are divided by it; 0 is greedy"""
    top_k: int | None = None
    """only the k most probable tokens; None or 0 is off"""
    top_p: float = 1.0
    """only the most probable tokens that together hold this mass; 1 is off"""
    min_p: float = 0.0
    """only tokens at least this fraction as probable as the most probable one; 0 is off"""
    stop: tuple[str, ...] = ()
    """strings that end the text, which is cut before them"""
    stop_at_eos: bool = True
    """whether the tokenizer's end-of-text token, where it has one, ends the text"""
    seed: int = 0
    """seed of the draws where the caller gives no key"""
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the cached keys and values"""
    cache_length: int | None = None
    """slots of the cache in tokens; None is prompt and max_tokens, rounded up so that few lengths are compiled"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what would be right)."""
        if self.max_tokens < 1:
            yield "max_tokens", "must be at least 1"
        if not 0 <= self.min_tokens <= max(self.max_tokens, 0):
            yield "min_tokens", f"must be between 0 and max_tokens={self.max_tokens}"
        if not 0 < self.repetition_penalty < float("inf"):
            yield "repetition_penalty", "must be a positive number; 1 is off"
        if self.no_repeat_ngram < 0:
            yield "no_repeat_ngram", "must be at least 1, or 0 for off"
        if not 0 <= self.temperature < float("inf"):
            yield "temperature", "must be a positive number, or 0 for greedy"
        if self.top_k is not None and self.top_k < 0:
            yield "top_k", "must be at least 1, or 0 for off"
        if not 0 < self.top_p <= 1:
            yield "top_p", "must be above 0 and at most 1; 1 is off"
        if not 0 <= self.min_p <= 1:
            yield "min_p", "must be between 0 and 1; 0 is off"
        if "" in self.stop:
            yield "stop", "must not hold the empty string, which stands everywhere"
        if not 0 <= self.seed < 2**63:
            yield "seed", "must be at least 0 and below 2**63"
        if self.cache_length is not None and self.cache_length <= self.max_tokens:
            yield "cache_length", f"must exceed max_tokens={self.max_tokens} by the length of the prompt, or be None"
