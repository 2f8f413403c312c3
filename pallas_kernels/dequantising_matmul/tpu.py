"""The dequantising product on TPU: blocks of the matrix are expanded in fast memory and multiplied there.

The grid runs over blocks of the result, and innermost over the axis that is contracted. Codes two a byte are not
brought in order: the high halves of a row of bytes belong to the even inputs and the low ones to the odd, so x is cut
into those two parts beforehand (with the transposed matrix the result comes in two parts), and a block is two matrices.
A scale a block of inputs lies along the lanes: a gather spreads it. A scale a channel multiplies the sums instead.

A level of a codebook is found by four rounds of selects for the high halves (the arithmetic unit) and by a gather for
the low ones (the permute unit): each alone would keep one unit waiting for the other.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dequantising_matmul.weights import Form, Weights

LANES, PIECE = 128, 128
"""Lanes of a register; outputs that are expanded at a time."""
ROWS, COLUMNS, DEPTH = 512, 256, 4096
"""Of a block, at most: rows of x, columns of the result, what is contracted. Short contractions wait for their sums."""
VMEM_BYTES = 40 * 2**20
"""What a kernel may take of a core's vector memory."""
DTYPES = (jnp.bfloat16, jnp.float32)


def refusal(x: Array, weights: Weights, form: Form) -> str | None:
    """Why the kernel cannot do it, or None."""
    outputs, size = weights.codes.shape
    blocks = weights.scales.shape[1]
    if x.dtype not in DTYPES:
        return f"takes bfloat16 and float32, not {x.dtype}"
    if not x.shape[0]:
        return "takes one row at least"
    if outputs % LANES or size % LANES:
        return f"takes outputs and bytes of an output in multiples of {LANES}, not {outputs} and {size}"
    if form.levels is not None and form.bits != 4:
        return f"takes codebooks of 4 bits, not of {form.bits}"
    block, whole = form.size(blocks), LANES * form.packed
    if block % whole and whole % block:
        return f"takes blocks of inputs that divide {whole} or are multiples of it, not of {block}"
    return None


@dataclass(frozen=True)
class Tiling:
    """Sizes of the blocks."""

    rows: int
    outputs: int
    bytes: int


def tiling(rows: int, weights: Weights, form: Form, transpose: bool) -> Tiling:
    """The blocks of a product with that many rows: bytes in about equal parts, outputs in parts that divide them."""
    outputs, size = weights.codes.shape
    columns, depth = (DEPTH, COLUMNS) if transpose else (COLUMNS, DEPTH)
    while outputs % columns:
        columns //= 2
    steps = pl.cdiv(size, depth // form.packed)
    return Tiling(min(rows, ROWS), columns, pl.cdiv(size, steps * LANES) * LANES)


# ---- expansion -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expansion:
    """How a block of codes becomes weights."""

    form: Form
    size: int
    """inputs of a block of one scale"""
    scaled: bool
    """whether scales are multiplied in here"""
    step: int
    """bytes of a block of codes"""

    def place(self, byte: Any) -> Any:
        """The block of inputs that a byte belongs to."""
        return jax.lax.div(byte * self.form.packed, jnp.int32(self.size))

    def __call__(self, k: Any, codes: Any, tables: Sequence[Any], out: Any) -> None:
        """Write the weights of the codes of step k to `out` `[packed, outputs, bytes]`, a few registers at a time.

        `tables`: scales where they are multiplied in, then zeros, of all blocks.
        """
        lane = jnp.broadcast_to(self.place(jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)), (PIECE, LANES))
        for row, at in itertools.product(range(0, codes.shape[0], PIECE), range(0, self.step, LANES)):
            piece = pl.ds(row, PIECE), pl.ds(at, LANES)
            first = self.place(k * self.step + at)
            block = lane + jax.lax.rem(first, jnp.int32(LANES))
            found = [along_lanes(tile(table, piece[0], first), block) for table in tables]
            scale = found.pop(0) if self.scaled else None
            zero = found[0] if found else self.form.middle
            data = codes[piece].astype(jnp.int32)
            for half, code in enumerate((data >> 4, data & 15) if self.form.packed == 2 else (data,)):
                value = self.value(code, zero, half)
                out[half, *piece] = (value if scale is None else value * scale).astype(out.dtype)

    def value(self, code: Int[Array, "outputs lanes"], zero: Any, half: int) -> Float[Array, "outputs lanes"]:
        """The number that a code stands for."""
        if self.form.levels is None:
            return code.astype(jnp.float32) - zero
        return gathered(code, self.form.levels) if half else selected(code, self.form.levels)


def tile(table: Any, rows: Any, first: Any) -> Float[Array, "rows lanes"]:
    """The 128 columns of a table that hold column `first`; any where the table ends before it."""
    blocks = table.shape[1]
    if blocks <= LANES:
        return jnp.pad(table[rows], ((0, 0), (0, LANES - blocks)))
    at = jax.lax.div(jnp.minimum(first, blocks - 1), jnp.int32(LANES)) * LANES
    return table[rows, pl.ds(pl.multiple_of(at, LANES), LANES)]


def along_lanes(
    table: Float[Array, "outputs lanes"], index: Int[Array, "outputs lanes"]
) -> Float[Array, "outputs lanes"]:
    """table[o, index[o, l]]."""
    return jnp.take_along_axis(table, index, axis=1, mode="promise_in_bounds")


def selected(code: Int[Array, "outputs lanes"], levels: tuple[float, ...]) -> Float[Array, "outputs lanes"]:
    """levels[code], one bit of the code after the other."""
    found: list[Any] = [jnp.float32(level) for level in levels]
    bit = 1
    while len(found) > 1:
        odd: Bool[Array, "outputs lanes"] = (code & bit) != 0
        found = [jnp.where(odd, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def gathered(code: Int[Array, "outputs lanes"], levels: tuple[float, ...]) -> Float[Array, "outputs lanes"]:
    """levels[code], from a row of lanes that holds the levels."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = functools.reduce(
        lambda row, i: jnp.where(lane == i, levels[i], row), range(len(levels)), jnp.zeros((1, LANES))
    )
    return along_lanes(jnp.broadcast_to(row, code.shape), code)


# ---- products --------------------------------------------------------------------------------------------------------


def product(x: Float[Array, "rows inputs"], weights: Weights, form: Form) -> Float[Array, "rows outputs"]:
    """x W. With a scale a channel: (x C) scale, C the matrix without it."""
    call = Call.of(x, weights, form, transpose=False)
    t, (outputs, _) = call.tiling, weights.codes.shape
    scale = () if call.expansion.scaled else (weights.scales.reshape(1, outputs),)
    specs = [
        pl.BlockSpec((form.packed, t.rows, t.bytes), lambda n, m, k: (0, m, k)),
        pl.BlockSpec((t.outputs, t.bytes), lambda n, m, k: (n, k)),
        *(pl.BlockSpec((t.outputs, table.shape[1]), lambda n, m, k: (n, 0)) for table in call.tables),
        *(pl.BlockSpec((1, t.outputs), lambda n, m, k: (0, n)) for _ in scale),
    ]
    return call.run(
        product_kernel,
        (outputs // t.outputs, pl.cdiv(x.shape[0], t.rows), call.steps),
        (call.halves(x), weights.codes, *call.tables, *scale),
        specs,
        pl.BlockSpec((t.rows, t.outputs), lambda n, m, k: (m, n)),
        (x.shape[0], outputs),
    )


def product_kernel(expansion: Expansion, x: Any, codes: Any, *refs: Any) -> None:
    """One block of bytes added to one block of the result."""
    *tables, out, total, expanded = refs
    scale = None if expansion.scaled else tables.pop()
    k = pl.program_id(2)
    expansion(k, codes, tables, expanded)
    accumulate(total, functools.reduce(jnp.add, [dot(x[i], expanded[i], 1) for i in range(expanded.shape[0])]))

    @pl.when(k == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = (total[...] if scale is None else total[...] * scale[...]).astype(out.dtype)


def transposed_product(x: Float[Array, "rows outputs"], weights: Weights, form: Form) -> Float[Array, "rows inputs"]:
    """x W^T. With a scale a channel: (x scale) C^T."""
    call = Call.of(x, weights, form, transpose=True)
    t, (outputs, size) = call.tiling, weights.codes.shape
    if not call.expansion.scaled:
        x = (x * weights.scales[:, 0]).astype(x.dtype)
    specs = [
        pl.BlockSpec((t.rows, t.outputs), lambda k, m, n: (m, n)),
        pl.BlockSpec((t.outputs, t.bytes), lambda k, m, n: (n, k)),
        *(pl.BlockSpec((t.outputs, table.shape[1]), lambda k, m, n: (n, 0)) for table in call.tables),
    ]
    found = call.run(
        transposed_kernel,
        (call.steps, pl.cdiv(x.shape[0], t.rows), outputs // t.outputs),
        (x, weights.codes, *call.tables),
        specs,
        pl.BlockSpec((form.packed, t.rows, t.bytes), lambda k, m, n: (0, m, k)),
        (form.packed, x.shape[0], size),
    )
    return jnp.moveaxis(found, 0, -1).reshape(x.shape[0], form.inputs)


def transposed_kernel(expansion: Expansion, x: Any, codes: Any, *refs: Any) -> None:
    """One block of outputs added to one block of the result, even and odd inputs apart."""
    *tables, out, total, expanded = refs
    n = pl.program_id(2)
    expansion(pl.program_id(0), codes, tables, expanded)
    accumulate(total, jnp.stack([dot(x[...], expanded[i], 0) for i in range(expanded.shape[0])]))

    @pl.when(n == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def accumulate(total: Any, found: Array) -> None:
    """Add to the sums over the innermost axis of the grid."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = found

    @pl.when(pl.program_id(2) > 0)
    def _() -> None:
        total[...] += found


def dot(left: Float[Array, "m k"], right: Float[Array, "..."], axis: int) -> Float[Array, "m n"]:
    """left times right over axis 1 and `axis`, sums in float32; float32 arrays in full precision."""
    precision = jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Call:
    """What both products have in common."""

    expansion: Expansion
    tiling: Tiling
    steps: int
    """along the bytes; the last may reach beyond them, where x is padded with zeros and codes may be anything"""
    tables: tuple[Float[Array, "outputs lanes"], ...]
    """scales and zeros by block; of more than 128 blocks, a multiple of 128"""

    @classmethod
    def of(cls, x: Array, weights: Weights, form: Form, transpose: bool) -> "Call":
        """The call for these arrays."""
        t, blocks = tiling(x.shape[0], weights, form, transpose), weights.scales.shape[1]
        expansion = Expansion(form, form.size(blocks), blocks > 1, t.bytes)
        tables = (weights.scales,) * expansion.scaled + (() if weights.zeros is None else (weights.zeros,))
        if blocks > LANES:
            tables = tuple(jnp.pad(table, ((0, 0), (0, -blocks % LANES))) for table in tables)
        return cls(expansion, t, pl.cdiv(weights.codes.shape[1], t.bytes), tables)

    def halves(self, x: Float[Array, "rows inputs"]) -> Float[Array, "packed rows bytes"]:
        """The inputs of each half of the bytes, with zeros up to the end of the last step."""
        packed = self.expansion.form.packed
        parts = jnp.moveaxis(x.reshape(x.shape[0], -1, packed), -1, 0)
        return jnp.pad(parts, ((0, 0), (0, 0), (0, self.steps * self.tiling.bytes - parts.shape[2])))

    def run(
        self, kernel: Any, grid: tuple[int, ...], arrays: tuple[Array, ...], specs: list[Any], out: Any, shape: Any
    ) -> Array:
        """The result of the kernel over the grid."""
        x, codes = arrays[:2]
        inputs, outputs = self.expansion.form.inputs, codes.shape[0]
        rows = math.prod(shape) // (inputs if len(shape) == 3 else outputs)
        moved = codes.size + (rows * (inputs + outputs)) * x.dtype.itemsize + 4 * sum(t.size for t in self.tables)
        return pl.pallas_call(
            functools.partial(kernel, self.expansion),
            out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
            grid=grid,
            in_specs=specs,
            out_specs=out,
            scratch_shapes=[
                pltpu.VMEM(out.block_shape, jnp.float32),
                pltpu.VMEM((self.expansion.form.packed, self.tiling.outputs, self.tiling.bytes), x.dtype),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(flops=2 * rows * inputs * outputs, bytes_accessed=moved, transcendentals=0),
            name="dequantising_matmul",
        )(*arrays)
