"""AdaQ: the frames of a video that a query is about, few and near where it is local, spread out where it is global.

A reconstruction of 2606.24187: its abstract gives the shape (a quasi-Gaussian over time, an interval of three standard
deviations, one hyper-parameter, no training), not the rule for its spread. That one is ours.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int


def ada_q(similarity: Float[Array, " frames"], count: int, temperature: float = 0.05) -> Int[Array, " count"]:
    """Indices, ascending and all different, of `count` of the frames: quantiles of `truncated_gaussian`.

    `similarity` are cosines of the frames with the query, `temperature` what divides them: the hyper-parameter.
    Raises ValueError where there are fewer frames than `count`.
    """
    frames = len(similarity)
    if not 1 <= count <= frames:
        raise ValueError(f"{count} frames cannot be chosen of {frames}")
    mean, std = spread(similarity, count, temperature)
    quantiles = (jnp.arange(count) + 0.5) / count
    low, high = bounds(mean, std, frames)
    places = truncated_gaussian(quantiles, mean, std, low, high)
    return distinct(jnp.floor(places).astype(jnp.int32), jnp.floor(low), jnp.ceil(high))


def spread(
    similarity: Float[Array, " frames"], count: int, temperature: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Centre and standard deviation, in frames, of p = softmax(similarity / temperature), a frame's middle at + 1/2.

    The centre is the best frame. The effective number of frames n = exp(entropy(p)) sets the deviation,
    n / sqrt(2 pi e) as in a Gaussian of that entropy, over 1 - n / frames: where p is flat it grows beyond all bounds,
    and the truncated Gaussian becomes uniform. Three of it on each side leave room for `count` frames.
    """
    frames = len(similarity)
    p = jax.nn.softmax(similarity.astype(jnp.float32) / temperature)
    effective = jnp.exp(jnp.sum(entr(p)))
    std = effective / math.sqrt(2 * math.pi * math.e) / jnp.maximum(1 - effective / frames, 1e-3)
    return jnp.argmax(p) + 0.5, jnp.maximum(std, count / 3)


def bounds(mean: Float[Array, ""], std: Float[Array, ""], frames: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The part of the video within three standard deviations."""
    return jnp.maximum(mean - 3 * std, 0.0), jnp.minimum(mean + 3 * std, float(frames))


def truncated_gaussian(
    quantiles: Float[Array, " count"],
    mean: Float[Array, ""],
    std: Float[Array, ""],
    low: Float[Array, ""],
    high: Float[Array, ""],
) -> Float[Array, " count"]:
    """F^-1(q) of N(mean, std^2) between low and high: mean + std Phi^-1(Phi(a) + q (Phi(b) - Phi(a)))."""
    a, b = norm.cdf((low - mean) / std), norm.cdf((high - mean) / std)
    return jnp.clip(mean + std * norm.ppf(a + quantiles * (b - a)), low, high)


def distinct(indices: Int[Array, " count"], low: Float[Array, ""], high: Float[Array, ""]) -> Int[Array, " count"]:
    """Ascending indices moved as little as it takes for all to be different integers of [low, high)."""
    rank = jnp.arange(len(indices))
    free = jax.lax.cummax(jnp.maximum(indices - rank, low.astype(jnp.int32)))
    return jnp.minimum(free, high.astype(jnp.int32) - len(indices)) + rank
