"""Double quantisation: the scales of blocks, less their mean, in 8 bits, with a scale of their own for every 256.

    s_k ~ absmax_{k // 256} map[code_k] + mean(s)

Dettmers et al. 2023 (2305.14314). Blocks of 64 weights then cost 8/64 + 32/(64 256) = 0.127 bits a weight instead of
0.5. The map is the signed dynamic one of Dettmers 2015 (1511.04561): the place of the first set bit after the sign is
a decimal exponent, and the bits behind it divide a decade evenly.
"""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from llmjax.quant.codebook import nearest
from llmjax.quant.formats import inverse

GROUP = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoubleScales:
    """Scales of the blocks of a matrix (or of a stack of them), in 8 bits."""

    codes: UInt8[Array, "*stack rows blocks"]
    absmax: Float[Array, "*stack groups"]
    """float32, one for 256 scales in their flat order"""
    mean: Float[Array, "*stack"]
    """float32, of all scales of a matrix"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scales."""
        return self.codes.shape

    def values(self) -> Float[Array, "*stack rows blocks"]:
        """The scales in float32."""
        *stack, rows, blocks = self.codes.shape
        absmax = jnp.repeat(self.absmax, GROUP, axis=-1, total_repeat_length=self.absmax.shape[-1] * GROUP)
        absmax = absmax[..., : rows * blocks].reshape(*stack, rows, blocks)
        return jnp.asarray(dynamic_map())[self.codes] * absmax + self.mean[..., None, None]


def double_quantise(scales: Float[Array, "*stack rows blocks"]) -> DoubleScales:
    """Scales in 8 bits, each matrix of the stack by itself."""
    *stack, rows, blocks = scales.shape
    flat = scales.astype(jnp.float32).reshape(*stack, rows * blocks)
    mean = jnp.mean(flat, axis=-1)
    spare = -flat.shape[-1] % GROUP
    centred = jnp.pad(flat - mean[..., None], [(0, 0)] * len(stack) + [(0, spare)])
    groups = centred.reshape(*stack, -1, GROUP)
    absmax = jnp.max(jnp.abs(groups), axis=-1)
    codes = nearest(groups * inverse(absmax)[..., None], dynamic_map())
    codes = codes.reshape(*stack, -1)[..., : rows * blocks].reshape(*stack, rows, blocks)
    return DoubleScales(codes, absmax, mean)


@lru_cache(maxsize=1)
def dynamic_map() -> Float[np.ndarray, " 256"]:
    """0, 1, and in decade i (10^(i-6), i = 0 .. 6) the middles of 2^i even parts of [0.1, 1], of both signs."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        middles = np.float32(10.0 ** (i - 6)) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles]
    return np.sort(np.asarray(values, np.float32))
