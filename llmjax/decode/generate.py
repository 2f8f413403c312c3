"""Generation on token ids: `(params, prompts, key) -> tokens, log-probs`, as two compiled functions around one carry.

`begin` runs the padded prompts and draws the first token; `advance` draws more in one `while_loop`, up to a step that
is an argument. Whole answers are one call of it, streams are many with the same executable, so both give the same
tokens. The carry is donated: the cache's buffers are used again.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llmjax.config import InputError, validate
from llmjax.decode.config import Generate
from llmjax.decode.samplers import draw, log_probs_of, process
from llmjax.nn.decoder import Decoder, readout
from llmjax.nn.model import Model, Params

SMALLEST = 16
"""shortest padded length, in tokens"""


class Generation(NamedTuple):
    """What was generated, as numpy arrays; entries from a row's length on are 0.

    `log_probs` are those of the distribution that was sampled from (0 for greedy), `model_log_probs` the model's own:
    temperature 1, unprocessed. `lengths` count a stop token; `stopped` is false where max_tokens came first.
    """

    tokens: Int[np.ndarray, "batch steps"]
    lengths: Int[np.ndarray, "batch"]
    log_probs: Float[np.ndarray, "batch steps"]
    model_log_probs: Float[np.ndarray, "batch steps"]
    stopped: Bool[np.ndarray, "batch"]


class Carry(NamedTuple):
    """The state of a generation between steps."""

    state: Any
    history: Int[Array, "batch slots"]
    log_probs: Float[Array, "batch slots"]
    model_log_probs: Float[Array, "batch slots"]
    lengths: Int[Array, "batch"]
    prompt_lengths: Int[Array, "batch"]
    done: Bool[Array, "batch"]
    keys: PRNGKeyArray
    step: Int[Array, ""]


class Plan(NamedTuple):
    """The static shapes of a generation: padded prompt length, and slots of cache and history."""

    width: int
    slots: int


def generate(
    config: Generate,
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: PRNGKeyArray | None = None,
    stop_ids: Sequence[int] = (),
) -> Generation:
    """Continue every prompt (token ids) until a token of `stop_ids` or max_tokens.

    `key` is one key, folded by row, or an array of one key a row; None is `config.seed`. A row's result depends on its
    prompt and its key, not on the other rows. Raises InputError for prompts and stop tokens that do not fit.
    """
    *_, last = stream(config, model, params, prompts, key, stop_ids, every=config.max_tokens)
    return last


def stream(
    config: Generate,
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: PRNGKeyArray | None = None,
    stop_ids: Sequence[int] = (),
    every: int = 8,
) -> Iterator[Generation]:
    """Yield everything generated so far after each `every` steps; the last one is what `generate` returns."""
    validate(config)
    plan = check(config, model, prompts, stop_ids)
    model, params = laid_out(model, params)
    sampling, stops = sampled_by(config), tuple(sorted(set(stop_ids)))
    tokens, positions = left_pad(prompts, plan.width)
    keys = row_keys(config, len(prompts), key)
    carry = begin(params, tokens, positions, keys, model=model, config=sampling, slots=plan.slots, stop_ids=stops)
    for until in (*range(every, config.max_tokens, every), config.max_tokens):
        if until > 1:
            carry = advance(params, carry, until, model=model, config=sampling, width=plan.width, stop_ids=stops)
        result = collect(carry, plan.width, config.max_tokens)
        yield result
        if result.stopped.all():
            return


@functools.partial(jax.jit, static_argnames=("model", "config", "slots", "stop_ids"))
def begin(
    params: Params,
    tokens: Int[Array, "batch width"],
    positions: Int[Array, "batch width"],
    keys: PRNGKeyArray,
    *,
    model: Model,
    config: Generate,
    slots: int,
    stop_ids: tuple[int, ...],
) -> Carry:
    """Run left-padded prompts (position -1: padding) through the model in one pass and draw the first token."""
    batch, width = tokens.shape
    state = model.init_state(batch, slots, config.cache_dtype)
    variables = {"params": params}
    features, state = model.build().apply(variables, tokens, positions, state=state, method="features")
    logits = readout(features.replace(hidden=features.hidden[:, -1:]))[:, 0]
    carry = Carry(
        state=state,
        history=jnp.full((batch, slots), -1, jnp.int32).at[:, :width].set(jnp.where(positions < 0, -1, tokens)),
        log_probs=jnp.zeros((batch, slots - width), jnp.float32),
        model_log_probs=jnp.zeros((batch, slots - width), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        prompt_lengths=positions[:, -1] + 1,
        done=jnp.zeros(batch, bool),
        keys=keys,
        step=jnp.zeros((), jnp.int32),
    )
    return record(carry, logits, config, width, stop_ids)


@functools.partial(jax.jit, static_argnames=("model", "config", "width", "stop_ids"), donate_argnames=("carry",))
def advance(
    params: Params,
    carry: Carry,
    until: Int[Array, ""],
    *,
    model: Model,
    config: Generate,
    width: int,
    stop_ids: tuple[int, ...],
) -> Carry:
    """Draw tokens until every row is done or has `until` of them; `width` is the length of the padded prompts."""
    module = model.build()

    def unfinished(carry: Carry) -> Bool[Array, ""]:
        return (carry.step < until) & ~jnp.all(carry.done)

    def body(carry: Carry) -> Carry:
        last = jax.lax.dynamic_slice_in_dim(carry.history, width + carry.step - 1, 1, axis=1)
        positions = (carry.prompt_lengths + carry.step - 1)[:, None]
        logits, state = module.apply({"params": params}, jnp.maximum(last, 0), positions, state=carry.state)
        return record(carry._replace(state=state), logits[:, 0], config, width, stop_ids)

    return jax.lax.while_loop(unfinished, body, carry)


def record(
    carry: Carry, logits: Float[Array, "batch vocab"], config: Generate, width: int, stop_ids: tuple[int, ...]
) -> Carry:
    """Draw one token a row from `logits` and store it with its log-probabilities; rows that are done stay."""
    step = carry.step
    sampled = process(logits, config, carry.history, width + step, step, stop_ids)
    tokens = jnp.argmax(sampled, -1) if config.temperature == 0 else draw(sampled, carry.keys, step)
    tokens = tokens.astype(jnp.int32)

    def put(store: Array, values: Array, empty: int, at: Int[Array, ""]) -> Array:
        values = jnp.where(carry.done, empty, values).astype(store.dtype)
        return jax.lax.dynamic_update_slice_in_dim(store, values[:, None], at, axis=1)

    stops = functools.reduce(jnp.logical_or, [tokens == stop for stop in stop_ids], jnp.zeros_like(carry.done))
    return carry._replace(
        history=put(carry.history, tokens, -1, width + step),
        log_probs=put(carry.log_probs, log_probs_of(sampled, tokens), 0, step),
        model_log_probs=put(carry.model_log_probs, log_probs_of(jax.nn.log_softmax(logits), tokens), 0, step),
        lengths=carry.lengths + ~carry.done,
        done=carry.done | stops,
        step=step + 1,
    )


def collect(carry: Carry, width: int, max_tokens: int) -> Generation:
    """The carry's results on the host. They are copied: the carry's buffers are written over by the next `advance`."""
    end = width + max_tokens
    return Generation(
        tokens=np.maximum(np.array(carry.history[:, width:end]), 0),
        lengths=np.array(carry.lengths),
        log_probs=np.array(carry.log_probs[:, :max_tokens]),
        model_log_probs=np.array(carry.model_log_probs[:, :max_tokens]),
        stopped=np.array(carry.done),
    )


def check(config: Generate, model: Model, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> Plan:
    """The padded shapes; raises InputError for prompts or stop tokens that the model or the cache has no room for."""
    vocab, longest = getattr(model, "vocab", None), max(map(len, prompts), default=0)
    if not prompts:
        raise InputError("prompts is empty: give at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompts[{i}] is empty and there is no token to begin with: give at least one token")
        if vocab is not None and not set(prompt) <= set(range(vocab)):
            raise InputError(f"prompts[{i}] holds token ids outside 0 to {vocab - 1}, the model's vocabulary")
    for stop in stop_ids:
        if vocab is not None and stop not in range(vocab):
            raise InputError(f"stop token {stop} is unknown: the model's token ids are 0 to {vocab - 1}")
    learned = getattr(getattr(model, "positions", None), "length", None)
    # The last token drawn is stored but never read, so it needs no position.
    room = {"generate.cache_length": config.cache_length, "model.positions.length": learned and learned + 1}
    spare = {name: limit - config.max_tokens for name, limit in room.items() if limit is not None}
    for name, most in spare.items():
        if longest > most:
            why = f"leaves room for {max(most, 0)} beside generate.max_tokens={config.max_tokens}"
            raise InputError(f"prompt of {longest} tokens is too long: {name} {why}; shorten it or raise {name}")
    width = min(bucket(longest), *spare.values()) if spare else bucket(longest)
    return Plan(width, config.cache_length or bucket(width + config.max_tokens))


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`: few shapes, at most half as much again."""
    power = max(SMALLEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > SMALLEST and length <= power * 3 // 4 else power


def left_pad(
    prompts: Sequence[Sequence[int]], width: int
) -> tuple[Int[np.ndarray, "batch width"], Int[np.ndarray, "batch width"]]:
    """Right-aligned tokens (0 before them) and their positions (-1 before them), int32."""
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def row_keys(config: Generate, rows: int, key: PRNGKeyArray | None) -> PRNGKeyArray:
    """One key a row: those given, or the one given (or the seed's) folded with the row's number."""
    key = jax.random.key(config.seed) if key is None else key
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"key has shape {key.shape}: give one key, or one for each of the {rows} prompts")
    return key


def laid_out(model: Model, params: Params) -> tuple[Model, Params]:
    """The same model with its repeats written out as one pattern, where its `unroll` says that it is short.

    A scan over layers stacks their caches and slices their weights, and on CPU XLA copies both in every step. Each
    layer of a written-out pattern owns its arrays.
    """
    if not isinstance(model, Decoder):
        return model, params
    repeats = model.layers // len(model.pattern)
    if repeats < 2 or repeats > model.unroll:
        return model, params
    blocks = written_out(params["blocks"], repeats)
    return dataclasses.replace(model, pattern=model.pattern * repeats), {**params, "blocks": blocks}


@functools.partial(jax.jit, static_argnames=("repeats",))
def written_out(blocks: Params, repeats: int) -> Params:
    """Weights of a pattern repeated `repeats` times as those of one pattern; leaves `[repeats, ...]` -> `[1, ...]`."""

    def layer(name: str, repeat: int) -> Params:
        return jax.tree.map(lambda leaf: leaf[repeat : repeat + 1], blocks[name])

    count = len(blocks)
    return {str(repeat * count + i): layer(str(i), repeat) for repeat in range(repeats) for i in range(count)}


def sampled_by(config: Generate) -> Generate:
    """`config` with the fields at rest that compiled code does not read, so that changing them compiles nothing."""
    return dataclasses.replace(config, prompt="", max_tokens=1, stop=(), stop_at_eos=True, seed=0, cache_length=None)
