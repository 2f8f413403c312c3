"""Samplers: pure functions on next-token logits, and their composition in one fixed order.

Every function maps float32 scores `[batch, vocab]` to scores; a token that may not be drawn gets -inf. `process` does
repetition penalty, no-repeat n-grams, minimum length, temperature, top-k, top-p and min-p in that order, the order of
transformers' `generate`, and returns log-probabilities: those of the distribution that is sampled from.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llmjax.decode.config import Generate


def process(
    logits: Float[Array, "batch vocab"],
    config: Generate,
    history: Int[Array, "batch slots"],
    end: Int[Array, ""] | int,
    step: Int[Array, ""] | int,
    stop_ids: Sequence[int] = (),
) -> Float[Array, "batch vocab"]:
    """Float32 log-probabilities of the distribution that `config` samples from.

    `history` holds prompt and answer so far, right-aligned at slot `end`, -1 where there is no token; `step` counts the
    answer's tokens. With temperature 0 the distribution is a point mass on the most probable token left.
    """
    scores = logits.astype(jnp.float32)
    if config.repetition_penalty != 1:
        scores = repetition_penalty(scores, history, config.repetition_penalty)
    if config.no_repeat_ngram:
        scores = no_repeat_ngram(scores, history, end, config.no_repeat_ngram)
    if config.min_tokens and stop_ids:
        scores = min_tokens(scores, step, config.min_tokens, stop_ids)
    if config.temperature == 0:
        return jnp.where(jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=bool), 0.0, -jnp.inf)
    scores = temperature(scores, config.temperature)
    if config.top_k:
        scores = top_k(scores, config.top_k)
    if config.top_p < 1:
        scores = top_p(scores, config.top_p)
    if config.min_p > 0:
        scores = min_p(scores, config.min_p)
    return jax.nn.log_softmax(scores, axis=-1)


def draw(log_probs: Float[Array, "batch vocab"], keys: PRNGKeyArray, step: Int[Array, ""] | int) -> Int[Array, "batch"]:
    """One token a row from exp(log_probs). Row i's draw is a function of (keys[i], step) and its own row only."""
    return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, log_probs)


def temperature(scores: Float[Array, "batch vocab"], value: float) -> Float[Array, "batch vocab"]:
    """scores / value: p_i is proportional to exp(score_i / T). Ackley, Hinton and Sejnowski 1985. `value` > 0."""
    return scores / value


def top_k(scores: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """Keep score_i where it is at least the k-th largest; ties with that one stay. Fan et al. 2018 (1805.04833)."""
    k = min(k, scores.shape[-1])
    least = jax.lax.top_k(scores, k)[0][:, -1:]
    return jnp.where(scores < least, -jnp.inf, scores)


def top_p(scores: Float[Array, "batch vocab"], p: float) -> Float[Array, "batch vocab"]:
    """Keep the smallest set of most probable tokens whose mass is at least p. Holtzman et al. 2019 (1904.09751).

    In descending order a token stays where the mass before it is below p; the first stays always. Of equally probable
    tokens at the border those with the larger id stay, as with transformers' stable ascending sort.
    """
    order = jnp.argsort(scores, axis=-1, stable=True)
    probs = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
    kept = (jnp.cumsum(probs, axis=-1) > 1 - p).at[:, -1].set(True)
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(kept).at[rows, order].set(kept), scores, -jnp.inf)


def min_p(scores: Float[Array, "batch vocab"], fraction: float) -> Float[Array, "batch vocab"]:
    """Keep tokens with p_i >= fraction * max_j p_j. Nguyen et al. 2024 (2407.01082)."""
    probs = jax.nn.softmax(scores, axis=-1)
    return jnp.where(probs < fraction * jnp.max(probs, axis=-1, keepdims=True), -jnp.inf, scores)


def repetition_penalty(
    scores: Float[Array, "batch vocab"], history: Int[Array, "batch slots"], penalty: float
) -> Float[Array, "batch vocab"]:
    """Of tokens in `history` (-1: none): score / penalty where positive, score * penalty where negative.

    Keskar et al. 2019 (CTRL, 1909.05858), with the sign rule of transformers' RepetitionPenaltyLogitsProcessor.
    """
    seen = mark(history, scores.shape[-1])
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(
    scores: Float[Array, "batch vocab"], history: Int[Array, "batch slots"], end: Int[Array, ""] | int, size: int
) -> Float[Array, "batch vocab"]:
    """-inf for each token that would make the last `size` tokens a run that `history` holds already.

    Token v is banned where some t has history[t : t+size-1] = the last size-1 tokens and history[t+size-1] = v.
    Paulus et al. 2017 (1705.04304). `end` is the number of slots in use.
    """
    slots = history.shape[1]
    if slots < size:
        return scores
    starts = slots - size + 1
    match = history[:, size - 1 :] >= 0
    for j in range(size - 1):
        recent = jax.lax.dynamic_slice_in_dim(history, end - (size - 1) + j, 1, axis=1)
        match &= (history[:, j : j + starts] == recent) & (recent >= 0)
    banned = mark(jnp.where(match, history[:, size - 1 :], -1), scores.shape[-1])
    return jnp.where(banned & (end >= size - 1), -jnp.inf, scores)


def min_tokens(
    scores: Float[Array, "batch vocab"], step: Int[Array, ""] | int, least: int, stop_ids: Sequence[int]
) -> Float[Array, "batch vocab"]:
    """-inf for the stop tokens while fewer than `least` tokens are generated (transformers' min_new_tokens)."""
    stops = jnp.zeros(scores.shape[-1], bool).at[jnp.asarray(stop_ids)].set(True)
    return jnp.where(stops & (step < least), -jnp.inf, scores)


def mark(tokens: Int[Array, "batch slots"], vocab: int) -> Array:
    """Boolean `[batch, vocab]`: which tokens occur in each row; -1 is no token."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    inside = jnp.where(tokens < 0, vocab, tokens)
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, inside].set(True, mode="drop")


def log_probs_of(log_probs: Float[Array, "... vocab"], tokens: Int[Array, "..."]) -> Float[Array, "..."]:
    """log p(token) for each token: `log_probs` at the tokens, along the last axis."""
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
