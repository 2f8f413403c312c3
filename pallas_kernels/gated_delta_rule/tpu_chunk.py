"""The gated delta rule on TPU: what a chunk of tokens does to a head's state, in products for the matrix unit.

Arrays begin with an axis of many chunks of many heads. All is float32 but what goes into a product, which is rounded to
the dtype of the inputs. Tokens lie along lanes where there is one number a token; masked sums over lanes make columns
of such rows. Every exponent is a sum of log decays, never a difference of two sums. Masks multiply, because the
compiler cannot estimate the cycles of products of selections.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Row = Float[Array, "many 1 chunk"]
Column = Float[Array, "many chunk 1"]
Square = Float[Array, "many chunk chunk"]
Mask = Float[Array, "chunk chunk"]
Keys = Float[Array, "many chunk key_dim"]
Values = Float[Array, "many chunk value_dim"]
State = Float[Array, "many key_dim value_dim"]


class Tokens(NamedTuple):
    """The tokens of chunks, each for one head; a chunk is a power of two."""

    query: Keys
    key: Keys
    value: Values
    beta: Row
    log_decay: Row | Keys
    """finite"""


class Prepared(NamedTuple):
    """What a chunk does to a state, whatever the state."""

    reads: Keys
    """queries, decayed since the chunk began"""
    replaces: Keys | None
    """keys, the same; None where values are added to what is there"""
    writes: Keys
    """keys, decayed to the chunk's end"""
    value: Values
    solved: Square | None
    """(I + diag(beta) L)^-1 diag(beta)"""
    scores: Square
    kept: Float[Array, "many #key_dim 1"]
    """what is left of the state"""


def prepare(dtype: Any, scale: float, replaces: bool, tokens: Tokens) -> Prepared:
    """The products of a chunk's tokens with each other.

    Values that are added are U = diag(beta) V. Those that replace what is there solve (I + diag(beta) L) U = diag(beta)
    (V - K~ S): L has the products of keys with earlier keys, decayed from one to the other, and K~ the keys, decayed
    since the chunk began. Yang et al. 2024 (2406.06484), section 3; Yang et al. 2024 (2412.06464), section 3.3.
    """
    query, key = tokens.query, tokens.key
    row, column = places(key.shape[1])
    scores, *overlaps = within(dtype, (query, key) if replaces else (query,), key, tokens.log_decay)
    since, until, kept = spans(dtype, tokens.log_decay)
    scores, reads = scale * (row >= column) * scores, query * (scale * since)
    if not replaces:
        return Prepared(reads, None, key * until, as_column(tokens.beta) * tokens.value, None, scores, kept)
    solved = inverse(dtype, as_column(tokens.beta) * (row > column) * overlaps[0]) * tokens.beta
    return Prepared(reads, key * since, key * until, tokens.value, solved, scores, kept)


def advance(dtype: Any, state: State, chunk: Prepared) -> tuple[State, Values]:
    """The state after a chunk and the output of its tokens; products are of `dtype`."""
    times = functools.partial(product, dtype)
    written = chunk.value
    if chunk.replaces is not None:
        written = times(chunk.solved, written - times(chunk.replaces, state))
    out = times(chunk.scores, written) + times(chunk.reads, state)
    return chunk.kept * state + times(chunk.writes, written, (0, 0)), out


def spans(dtype: Any, log_decay: Row | Keys) -> tuple[Column | Keys, Column | Keys, Float[Array, "many #key_dim 1"]]:
    """exp of the sums of log decays up to and with each token, after each token, and over the chunk."""
    row, column = places(log_decay.shape[2] if log_decay.shape[1] == 1 else log_decay.shape[1])
    if log_decay.shape[1] == 1:
        sums = [over_lanes(jnp.where(mask, log_decay, 0)) for mask in (row >= column, row < column)]
        return jnp.exp(sums[0]), jnp.exp(sums[1]), jnp.exp(over_lanes(log_decay))
    sums = [total(dtype, mask.astype(jnp.float32), log_decay) for mask in (row >= column, row < column)]
    return jnp.exp(sums[0]), jnp.exp(sums[1]), jnp.exp(as_column(jnp.sum(log_decay, axis=1, keepdims=True)))


def within(dtype: Any, left: tuple[Keys, ...], key: Keys, log_decay: Row | Keys) -> tuple[Square, ...]:
    """For each x of `left`, [i, j]: x_i^T diag(exp(sum of log decays after j up to i)) k_j for j <= i.

    What stands above the diagonal means nothing. Where each key dimension decays on its own, by doubling: two blocks
    that lie side by side are joined by one product, in which the second's tokens have decayed since its beginning and
    the first's up to its end.
    """
    row, column = places(key.shape[1])
    if log_decay.shape[1] == 1:
        late = jnp.where(row > column, as_column(log_decay), 0)
        decay = jnp.exp(total(dtype, (row >= column).astype(jnp.float32), late))
        return tuple(product(dtype, x, key, (1, 1)) * decay for x in left)
    found = [(row == column) * product(dtype, x, key, (1, 1)) for x in left]
    for size in doublings(key.shape[1]):
        block, other = row // size, column // size
        to_border = (block == other) & ((block % 2 == 1) ^ (row < column))
        decay = jnp.exp(total(dtype, to_border.astype(jnp.float32), log_decay))
        both = joined(row, column, size)
        found = [y + both * product(dtype, x * decay, key * decay, (1, 1)) for x, y in zip(left, found)]
    return tuple(found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total(dtype: Any, mask: Mask, x: Float[Array, "many chunk dim"]) -> Float[Array, "many chunk dim"]:
    """Sums of rows, those that each row of a mask names; in bfloat16 of the numbers' first 16 bits, not 8."""
    if dtype.itemsize > 2:
        return jnp.stack([dot(dtype, mask, rows) for rows in x])
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.stack([dot(dtype, mask, a) + dot(dtype, mask, b) for a, b in zip(high, x - high)])


def total_and_mask(dtype: Any, mask: Mask, x: Array) -> tuple[Array, Mask]:
    """The sums, and what their gradient needs."""
    return total(dtype, mask, x), mask


def total_gradient(dtype: Any, mask: Mask, d_out: Array) -> tuple[Mask, Array]:
    """Sums of columns of the mask."""
    return jnp.zeros_like(mask), jnp.stack([dot(dtype, mask, rows, (0, 0)) for rows in d_out])


total.defvjp(total_and_mask, total_gradient)


def dot(dtype: Any, a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Float[Array, "rows columns"]:
    """The product over one axis of each, summed in float32, of what is rounded to `dtype`; float32 is not rounded."""
    exact = jax.lax.Precision.HIGHEST if dtype.itemsize > 2 else jax.lax.Precision.DEFAULT
    # Rounded numbers lie in pairs, which would be taken apart again to be transposed.
    upright = (a if axes[0] == 1 else a.T).astype(dtype)
    numbers = (((1,), (axes[1],)), ((), ()))
    return jax.lax.dot_general(upright, b.astype(dtype), numbers, precision=exact, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(dtype: Any, a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Float[Array, "many rows columns"]:
    """`dot` of many pairs side by side: the matrix units are kept busy by products that do not wait for each other."""
    return jnp.stack([dot(dtype, x, y, axes) for x, y in zip(a, b)])


def product_and_factors(dtype: Any, a: Array, b: Array, axes: tuple[int, int]) -> tuple[Array, tuple[Array, Array]]:
    """The product, and what its gradient needs."""
    return product(dtype, a, b, axes), (a, b)


def product_gradients(
    dtype: Any, axes: tuple[int, int], factors: tuple[Array, Array], d_out: Array
) -> tuple[Array, Array]:
    """Products again, of factors that are rounded again."""
    (a, b), (i, j) = factors, axes
    d_a = product(dtype, d_out, b, (1, 1 - j)) if i == 1 else product(dtype, b, d_out, (1 - j, 1))
    d_b = product(dtype, a, d_out, (1 - i, 0)) if j == 0 else product(dtype, d_out, a, (0, 1 - i))
    return d_a, d_b


product.defvjp(product_and_factors, product_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def inverse(dtype: Any, lower: Square) -> Square:
    """(I + L)^-1 of strictly lower triangular L, in products of `dtype`.

    By doubling: blocks with inverses X are joined in pairs by X - X M X, where M is what L has between the two.
    """
    row, column = places(lower.shape[2])
    solved = (row == column) - lower * joined(row, column, 1)
    for size in doublings(lower.shape[2])[1:]:
        between = lower * joined(row, column, size)
        solved = solved - product(dtype, product(dtype, solved, between), solved)
    return solved


def inverse_and_itself(dtype: Any, lower: Square) -> tuple[Square, Square]:
    """The inverse, which is what its gradient needs."""
    solved = inverse(dtype, lower)
    return solved, solved


def inverse_gradient(dtype: Any, solved: Square, d_solved: Square) -> tuple[Square]:
    """-X^T dX X^T."""
    return (-product(dtype, product(dtype, solved, d_solved, (0, 0)), solved, (1, 1)),)


inverse.defvjp(inverse_and_itself, inverse_gradient)


def places(size: int) -> tuple[Int[Array, "size size"], Int[Array, "size size"]]:
    """The row and the column of every entry of a square."""
    shape = (size, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def doublings(size: int) -> list[int]:
    """1, 2, 4, ... below `size`."""
    return [1 << level for level in range((size - 1).bit_length())]


def joined(row: Array, column: Array, size: int) -> Array:
    """Where rows of an odd block of `size` meet columns of the even block before it."""
    block = row // size
    return (block % 2 == 1) & (block == column // size + 1)


def over_lanes(x: Float[Array, "many rows columns"]) -> Float[Array, "many rows 1"]:
    """The sum of each row."""
    return jnp.sum(x, axis=2, keepdims=True)


def as_column(x: Float[Array, "many 1 size"]) -> Float[Array, "many size 1"]:
    """The transpose of a row."""
    row, column = places(x.shape[2])
    return over_lanes(jnp.where(row == column, x, 0))
