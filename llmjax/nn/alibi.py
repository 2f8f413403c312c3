"""ALiBi: attention with a linear penalty of distance, steep in some heads and flat in others; no parameters."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmjax.nn.distance import DistanceBias, Folded
from llmjax.nn.initializers import Init


@dataclass(frozen=True)
class ALiBi(DistanceBias):
    """-slope_h |i - j|, slopes geometric. Press, Smith, Lewis 2021 (2108.12409); any head count as in their code."""

    def build(self, heads: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return ALiBiModule(heads, name=name)

    def scores(
        self,
        table: Float[Array, "heads 1"],
        query_positions: Int[Array, "batch length"],
        key_positions: Int[Array, "batch source"],
        causal: bool,
    ) -> Float[Array, "batch heads length source"]:
        """-slope |i - j|, causal or not."""
        distance = jnp.abs(query_positions[:, None, :, None] - key_positions[:, None, None, :])
        return -table.astype(jnp.float32)[:, :, None] * distance

    def fold(
        self,
        table: Float[Array, "heads 1"],
        query: Float[Array, "batch length heads head_dim"],
        key: Float[Array, "batch source kv_heads head_dim"],
        query_positions: Int[Array, "batch length"],
        key_positions: Int[Array, "batch source"],
        scale: float,
        causal: bool,
    ) -> Folded:
        """Features of queries and keys where all visible keys are in the past; float16 has no room for positions."""
        if not causal or query.dtype == jnp.float16:
            return super().fold(table, query, key, query_positions, key_positions, scale, causal)
        return *extend(query, key, table[:, 0], query_positions, key_positions, scale), None


class ALiBiModule(nn.Module):
    """Shell of `alibi_slopes`; holds no parameters."""

    heads: int

    @nn.compact
    def __call__(self) -> Float[Array, "heads 1"]:
        """The slopes."""
        return jnp.asarray(alibi_slopes(self.heads)[:, None], jnp.float32)


def alibi_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """2^(-8 h / n), h = 1..n, for n the largest power of 2 up to `heads`; then every other slope of 2 n heads."""
    n = 2 ** (heads.bit_length() - 1)
    exponents = [*range(2, 2 * n + 1, 2), *range(1, 2 * (heads - n), 2)]
    return 2.0 ** (-4 * np.asarray(exponents) / n)


def extend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch source kv_heads head_dim"],
    slopes: Float[Array, " heads"],
    query_positions: Int[Array, "batch length"],
    key_positions: Int[Array, "batch source"],
    scale: float,
) -> tuple[Float[Array, "batch length heads wider"], Float[Array, "batch source kv_heads wider"]]:
    """Twelve more features so that q' k' scale = q k scale + slope_h (j - i), for bfloat16 and float32 arrays.

    With c in the middle of a row's queries, j - c is a sum of three numbers of 8 bits, slope / scale and -slope (i - c)
    / scale of three as well: exact in bfloat16, and so are their products in float32. What remains is the rounding of
    the sum, 2^-24 slope max(|i - c|, |j - c|) a term; when one token is decoded it is at c. Positions up to 2^24.
    """
    centre = (query_positions.min(axis=1) + query_positions.max(axis=1))[:, None] // 2
    slope = slopes.astype(jnp.float32) / scale
    shift = -slope * (query_positions - centre)[..., None]
    near = jnp.stack(position_parts(key_positions - centre), axis=-1)
    steep = jnp.stack(float_parts(slope), axis=-1)
    of_query = [jnp.broadcast_to(jnp.repeat(steep, 3, axis=-1), (*shift.shape, 9)), jnp.stack(float_parts(shift), -1)]
    of_key = jnp.concatenate([jnp.tile(near, 3), jnp.ones((*near.shape[:-1], 3), jnp.float32)], axis=-1)[:, :, None]
    of_key = jnp.broadcast_to(of_key, (*key.shape[:-1], 12))
    wider_query = jnp.concatenate([query, *(part.astype(query.dtype) for part in of_query)], axis=-1)
    return wider_query, jnp.concatenate([key, of_key.astype(key.dtype)], axis=-1)


def position_parts(x: Int[Array, "*shape"]) -> tuple[Float[Array, "*shape"], ...]:
    """`x` as three float32 summands, multiples of 65536, 256 and 1 by at most 256."""
    ones = (x + 128) % 256 - 128
    middle = (x - ones + 32768) % 65536 - 32768
    return tuple(part.astype(jnp.float32) for part in (x - ones - middle, middle, ones))


def float_parts(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], ...]:
    """Float32 `x` as three summands of 8 bits. (XLA may drop a cast to bfloat16 and back, never `reduce_precision`.)"""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    middle = jax.lax.reduce_precision(x - high, exponent_bits=8, mantissa_bits=7)
    return high, middle, x - high - middle
