"""Visual token reduction: image tokens that count for little are taken out of the sequence between two layers.

A method is a score of the tokens (`llmjax.nn.prior_tr`, `llmjax.nn.clse`); what is here removes the lowest ones. It is
for inference with a finished model: nothing is trained, and later layers compute and cache fewer tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.attention import Attention
from llmjax.nn.decoder import Decoder
from llmjax.nn.mixer import Context
from llmjax.nn.model import Features, Params, readout
from llmjax.nn.sites import CAPTURED
from llmjax.nn.stack import scanned


@struct.dataclass
class Seen:
    """What a score is made from: the tokens that are still there, and the attention of the layer just run.

    `first` is the residual stream before the first layer, `hidden` after that layer; `query` and `key` are as scored,
    times `scale`; `image` marks the image tokens.
    """

    first: Float[Array, "batch length d_model"]
    hidden: Float[Array, "batch length d_model"]
    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length kv_heads head_dim"]
    image: Bool[Array, "batch length"]
    scale: float = struct.field(pytree_node=False)


class Stage(NamedTuple):
    """After so many repeats of the pattern, `drop` image tokens of lowest `score` `[batch, length]` are removed."""

    after: int
    drop: int
    score: Callable[[Seen], Float[Array, "batch length"]]


def visual_attention(seen: Seen, row: Int[Array, " batch"]) -> Float[Array, "batch length"]:
    """Causal attention of token `row` to the image tokens: mean over heads, then normalised; 0 at other tokens."""
    length, groups = seen.key.shape[1], seen.query.shape[2] // seen.key.shape[2]
    query = jnp.take_along_axis(seen.query, row[:, None, None, None], axis=1)[:, 0].astype(jnp.float32)
    key = jnp.repeat(seen.key, groups, axis=2).astype(jnp.float32)
    scores = seen.scale * jnp.einsum("bhd,bshd->bhs", query, key)
    past = jnp.arange(length) <= row[:, None]
    weights = jax.nn.softmax(scores, axis=-1, where=past[:, None])
    mean = jnp.where(seen.image, jnp.mean(weights, axis=1), 0.0)
    return mean / jnp.sum(mean, axis=1, keepdims=True)


def kept(
    scores: Float[Array, "batch length"], image: Bool[Array, "batch length"], drop: int
) -> Int[Array, "batch rest"]:
    """Indices, ascending, of all tokens but the `drop` image tokens of lowest score; of equal ones the first stay.

    Each row must have at least `drop` image tokens.
    """
    order = jnp.argsort(jnp.where(image, -scores, -jnp.inf), axis=1)
    return jnp.sort(order[:, : scores.shape[1] - drop], axis=1)


def gather(tree: Any, indices: Int[Array, "batch rest"]) -> Any:
    """Arrays `[batch, length, ...]` (states, positions, caches) at these tokens: `[batch, rest, ...]`."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, indices.reshape(*indices.shape, *(1,) * (x.ndim - 2)), axis=1), tree
    )


def reduced_logits(
    model: Decoder,
    params: Params,
    embedded: Float[Array, "batch length d_model"],
    image: Bool[Array, "batch length"],
    stages: Sequence[Stage],
) -> tuple[Float[Array, "batch rest vocab"], Int[Array, "batch rest"]]:
    """Logits of the tokens that remain after all stages, and which they are; those that remain keep their positions.

    `embedded` is the site of that name (of a LLaVA, `language/embedded`), a row one whole document of as many tokens as
    the others. Scores are made from the attention of the pattern's last block. Raises ValueError where that is another
    mixer, where scores have a bias by distance or the head is a mixture, and where stages do not ascend from 1.
    """
    attention = model.pattern[-1].mixer
    if not isinstance(attention, Attention) or model.distance is not None or model.mixture is not None:
        raise ValueError("tokens are reduced by the scores of an Attention, with distance=None and mixture=None")
    ends = [0, *(stage.after for stage in stages)]
    if any(one >= two for one, two in pairwise(ends)) or ends[-1] > model.repeats:
        raise ValueError(f"stages after repeats {ends[1:]} must ascend from 1 to at most {model.repeats}")
    scale = attention.scale or attention.sizes(model.d_model)[2] ** -0.5
    positions = jnp.broadcast_to(jnp.arange(embedded.shape[1], dtype=jnp.int32), embedded.shape[:2])
    tokens, x = {"positions": positions, "image": image, "first": embedded}, embedded
    for start, stage in zip(ends, stages, strict=False):
        x, sites = run(model, params, x, tokens["positions"], start, stage.after)
        mixer = sites[str(len(model.pattern) - 1)]["mixer"]
        seen = Seen(tokens["first"], x, mixer["q"][-1], mixer["k"][-1], tokens["image"], scale)
        x, tokens = gather((x, tokens), kept(stage.score(seen), tokens["image"], stage.drop))
    x, _ = run(model, params, x, tokens["positions"], ends[-1], model.repeats)
    if model.norm is not None:
        norm: Any = model.norm.build().apply
        x = norm({"params": params["norm"]}, x)
    kernel = params["embed"]["embedding"].T if model.tied else params["head"]["kernel"]
    return readout(Features(x, kernel, model.soft_cap)), tokens["positions"]


def run(
    model: Decoder,
    params: Params,
    x: Float[Array, "batch length d_model"],
    positions: Int[Array, "batch length"],
    start: int,
    stop: int,
) -> tuple[Float[Array, "batch length d_model"], Any]:
    """Repeats `start` to `stop` of the pattern, and their sites, stacked."""
    if start == stop:
        return x, {}
    part = replace(model, layers=(stop - start) * len(model.pattern))
    layers = jax.tree.map(lambda a: a[start:stop], params["blocks"])
    apply: Any = scanned(part)(part).apply
    (x, _), captured = apply({"params": layers}, x, Context(positions), None, mutable=[CAPTURED])
    return x, captured[CAPTURED]
