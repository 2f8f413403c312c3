"""GPTQ: inputs are rounded one after the other, and those still free make up for the error.

With H = E[x x^T] + lambda I and H^-1 = U^T U, U upper triangular, for each row i of W `[inputs, outputs]` in turn:

    q_i = Q(w_i),   e = (w_i - q_i) / U_ii,   w_j <- w_j - U_ij e  for j > i

which is the least-squares answer of the free rows to the rounding of row i. Frantar et al. 2022 (2210.17323). Rows
within a chunk are updated at once, later ones after the chunk, in one product. A group's scale is fitted to its rows as
they are when their turn comes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from llmjax.config import InputError
from llmjax.quant.formats import Format, Scales, Zeros
from llmjax.quant.method import Method, Statistics
from llmjax.quant.tensor import Layout, QTensor, stored

HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class GPTQ(Method):
    """Error compensation with the inverse Hessian of the outputs' squared error."""

    damping: float = 0.01
    """lambda, as a part of the mean diagonal of H"""
    act_order: bool = False
    """round the inputs with the largest second moment first; costs four bytes an input"""
    chunk: int = 128
    """most rows that are updated at once; the result does not depend on it, the speed does"""

    def quantise(
        self, w: Float[Array, "outputs inputs"], seen: Statistics | None, form: Format, layout: Layout
    ) -> QTensor:
        """Raises InputError where blocks do not divide the inputs."""
        size = form.size(layout.rows, layout.columns)
        if not isinstance(form.block, str) and layout.rows % size:
            raise InputError(f"GPTQ needs groups that divide the inputs: block={size} does not divide {layout.rows}")
        assert seen is not None
        gram, order = seen.gram, None
        if self.act_order:
            order = jnp.argsort(-jnp.diagonal(gram))
            w, gram = w[:, order], gram[order][:, order]
        codes, scales, zeros = compensated(w.T, factor(gram, self.damping), form, size, self.chunk)
        return replace(stored(codes.T, scales, zeros, form, layout), order=order)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.damping <= 0:
            yield "damping", "must be above 0: inputs that hardly vary leave the Hessian without an inverse"
        if self.chunk < 1:
            yield "chunk", "must be at least 1"


def factor(gram: Float[Array, "inputs inputs"], damping: float) -> Float[Array, "inputs inputs"]:
    """U, upper triangular with U^T U = H^-1, by the Cholesky factor of H read backwards; dead inputs count as 1."""
    diagonal = jnp.diagonal(gram)
    dead = jnp.where(diagonal > 0, 0.0, 1.0)
    hessian = gram + jnp.diag(dead + damping * jnp.mean(diagonal + dead))
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    identity = jnp.eye(len(lower), dtype=lower.dtype)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1]


def compensated(
    w: Float[Array, "inputs outputs"], upper: Float[Array, "inputs inputs"], form: Format, size: int, chunk: int
) -> tuple[UInt8[Array, "inputs outputs"], Float[Array, "rows blocks"], Zeros]:
    """Codes of W, and the scales and zero points of its blocks."""
    inputs, outputs = w.shape
    grouped = not isinstance(form.block, str)
    chunk = math.gcd(chunk, size) if grouped else min(chunk, inputs)
    spare = -inputs % chunk
    whole = fitted(w, form, outputs)
    padded = jnp.pad(w, ((0, spare), (0, 0)))
    padded_upper = jnp.pad(upper, ((0, spare), (0, spare))) + jnp.diag(jnp.arange(inputs + spare) >= inputs)

    def step(carry: tuple[Array, Scales, Zeros], start: Array) -> tuple[tuple[Array, Scales, Zeros], tuple]:
        w, scales, zeros = carry
        if grouped:
            rows = jax.lax.dynamic_slice_in_dim(w, start, size)
            scales, zeros = jax.lax.cond(start % size == 0, lambda: form.fit(rows.T), lambda: (scales, zeros))
        block = jax.lax.dynamic_slice_in_dim(w, start, chunk)
        across = jax.lax.dynamic_slice_in_dim(padded_upper, start, chunk)
        within = jax.lax.dynamic_slice_in_dim(across, start, chunk, axis=1)
        codes, errors = one_by_one(block, within, form, scales, zeros)
        later = across * (jnp.arange(len(w)) >= start + chunk)
        w = w - jnp.matmul(later.T, errors, precision=HIGHEST)
        return (w, scales, zeros), (codes, scales, zeros)

    starts = jnp.arange(0, inputs + spare, chunk)
    _, (codes, scales, zeros) = jax.lax.scan(step, (padded, *whole), starts)
    codes = codes.reshape(inputs + spare, outputs)[:inputs]
    if grouped:
        every = size // chunk
        return codes, scales[::every].T, None if zeros is None else zeros[::every].T
    if form.block == "tensor":
        return codes, whole[0][:1, None], None if whole[1] is None else whole[1][:1, None]
    return codes, whole[0][:, None], None if whole[1] is None else whole[1][:, None]


def fitted(w: Float[Array, "inputs outputs"], form: Format, outputs: int) -> tuple[Float[Array, " outputs"], Zeros]:
    """Scale and zero point of every output, of a format's whole channels or matrix."""
    scales, zeros = form.fit(w.reshape(1, -1) if form.block == "tensor" else w.T)
    shape = (outputs,)
    return jnp.broadcast_to(scales, shape), None if zeros is None else jnp.broadcast_to(zeros, shape)


def one_by_one(
    block: Float[Array, "chunk outputs"], upper: Float[Array, "chunk chunk"], form: Format, scales: Scales, zeros: Zeros
) -> tuple[UInt8[Array, "chunk outputs"], Float[Array, "chunk outputs"]]:
    """Round the rows of a chunk in turn, each after those before it were made up for: codes, and the errors e."""

    def row(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block, codes, errors = carry
        code = form.round(block[i], scales, zeros)
        error = (block[i] - form.decode(code, scales, zeros)) / upper[i, i]
        return block - jnp.outer(upper[i], error), codes.at[i].set(code), errors.at[i].set(error)

    empty = jnp.zeros(block.shape, jnp.uint8), jnp.zeros_like(block)
    _, codes, errors = jax.lax.fori_loop(0, len(block), row, (block, *empty))
    return codes, errors
