"""AWQ: inputs that are large on average get larger weights, hence a finer grid, and are divided to make up for it.

    x W = (x / s)(s W),   s_i = E|x_i|^alpha / sqrt(max s min s),   alpha in {0, 1/n, ..} by least output error
    then, block by block, the largest weight that is kept: clip to c max|w|, c by least output error

Lin et al. 2023 (2306.00978). Output errors are those of the calibration data, tr(E G E^T) with G = E[x x^T].
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.quant.formats import Format, Scales, Zeros, into_blocks, per_weight, rounded
from llmjax.quant.method import Method, Statistics, encoded, output_loss
from llmjax.quant.tensor import Layout, QTensor


@dataclass(frozen=True)
class AWQ(Method):
    """Searched scaling of the inputs, and searched clipping."""

    grid: int = 20
    """values of alpha that are tried, 0 among them"""
    clips: int = 10
    """values of c that are tried between 1 and 1/2; 1 clips nothing"""

    def quantise(
        self, w: Float[Array, "outputs inputs"], seen: Statistics | None, form: Format, layout: Layout
    ) -> QTensor:
        """The matrix s W, with the gain 1 / s."""
        assert seen is not None
        s = search(w, seen, form, self.grid)
        scales, zeros = clipped_scales(w * s, seen.gram / jnp.outer(s, s), form, self.clips)
        return replace(encoded(w * s, scales, zeros, form, layout), gain=1 / s)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Searches of nothing."""
        for name in ("grid", "clips"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"


def search(
    w: Float[Array, "outputs inputs"], seen: Statistics, form: Format, grid: int = 20
) -> Float[Array, " inputs"]:
    """The s of least output error; alpha 0, which leaves W as it is, is among the choices.

    Matrices of the same inputs share an s that can be folded into what stands before them when they are searched as
    one, their outputs side by side.
    """

    def candidate(alpha: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, " inputs"]]:
        s = jnp.maximum(seen.mean, 1e-8) ** alpha
        s = s / jnp.sqrt(jnp.max(s) * jnp.min(s))
        return output_loss(rounded(w * s, form) / s - w, seen.gram), s

    losses, found = jax.lax.map(candidate, jnp.arange(grid) / grid)
    return found[jnp.argmin(losses)]


def clipped_scales(
    w: Float[Array, "outputs inputs"], gram: Float[Array, "inputs inputs"], form: Format, clips: int
) -> tuple[Scales, Zeros]:
    """Scales of the blocks, each fitted to weights clipped where its own part of the output error is least.

    Blocks that do not lie within one output stay as they are, and so does all where the whole error would grow.
    """
    outputs, inputs = w.shape
    blocks = into_blocks(w, form.size(inputs, outputs))
    plain = form.fit(blocks)
    rows, count, size = blocks.shape
    if rows != outputs:
        return plain
    own = jnp.diagonal(gram.reshape(count, size, count, size), axis1=0, axis2=2).transpose(2, 0, 1)
    top = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)

    def decoded(fit: tuple[Scales, Zeros]) -> Float[Array, "outputs count size"]:
        scales, zeros = per_weight(*fit)
        return form.decode(form.round(blocks, scales, zeros), scales, zeros)

    def candidate(ratio: Float[Array, ""]) -> tuple[Float[Array, "outputs count"], tuple[Scales, Zeros]]:
        fit = form.fit(jnp.clip(blocks, -ratio * top, ratio * top))
        error = decoded(fit) - blocks
        return jnp.einsum("oki,kij,okj->ok", error, own, error), fit

    losses, fits = jax.lax.map(candidate, 1 - 0.5 * jnp.arange(clips) / clips)
    best = jnp.argmin(losses, axis=0)[None]
    clipped = jax.tree.map(lambda fit: jnp.take_along_axis(fit, best, axis=0)[0], fits)
    before, after = (output_loss(decoded(fit).reshape(w.shape) - w, gram) for fit in (plain, clipped))
    return jax.tree.map(lambda a, b: jnp.where(after < before, a, b), clipped, plain)
