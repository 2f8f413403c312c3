"""The dequantising product: argument checks, and its gradient."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from pallas_kernels.dequantising_matmul.registry import choose, module_of
from pallas_kernels.dequantising_matmul.weights import Form, Weights


def dequantising_matmul(
    x: Float[Array, "*batch contracted"],
    codes: UInt8[Array, "outputs bytes"],
    scales: Float[Array, "outputs blocks"],
    zeros: Num[Array, "outputs blocks"] | None = None,
    *,
    bits: int,
    codebook: Sequence[float] | None = None,
    transpose: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*batch result"]:
    """x W, or with `transpose` x W^T, with a matrix W in 8 or 4 bits that is expanded where it is multiplied.

        W[i, o] = scale[o, b] (code[o, i] - zero[o, b])      integers; zero is 2^(bits - 1) where `zeros` is None
        W[i, o] = scale[o, b] codebook[code[o, i]]           a codebook of 2^bits levels
        b = i // (inputs / blocks)

    `codes` are the rows of a torch weight [out, in], a byte a code or two codes a byte, the first in the high bits, as
    bitsandbytes has them. One block an output is a scale a channel, more are groups: Dettmers et al. 2022 (2208.07339),
    Frantar et al. 2022 (2210.17323); NF4: Dettmers et al. 2023 (2305.14314). W is rounded to the dtype of x, with a
    scale a channel only what the scale multiplies; sums are float32 or wider, the result has the dtype of x.
    The gradient is x's alone, the product with the other of W and W^T; it keeps the codes.
    `implementation`: "reference", "xla", "tpu" or some of them in order; None takes the first that fits the platform.
    Raises ValueError where arguments disagree, NotImplementedError with the reason where no named one can do it.
    """
    form = checked(x, codes, scales, zeros, bits, codebook, transpose)
    weights = Weights(codes, scales.astype(jnp.float32), None if zeros is None else zeros.astype(jnp.float32))
    rows = x.reshape(-1, x.shape[-1])
    y = differentiable(choose(implementation, rows, weights, form), form, transpose, rows, weights)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable(
    name: str, form: Form, transpose: bool, x: Float[Array, "rows contracted"], weights: Weights
) -> Float[Array, "rows result"]:
    """The product by the implementation of that name."""
    module = module_of(name)
    return (module.transposed_product if transpose else module.product)(x, weights, form)


def _forward(name: str, form: Form, transpose: bool, x: Array, weights: Weights) -> tuple[Array, Weights]:
    return differentiable(name, form, transpose, x, weights), weights


def _backward(name: str, form: Form, transpose: bool, weights: Weights, dy: Array) -> tuple[Array, Any]:
    return differentiable(name, form, not transpose, dy, weights), jax.tree.map(_nothing, weights)


def _nothing(leaf: Array) -> Array | np.ndarray:
    """The zero gradient of a leaf: of integers, jax's empty kind."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


differentiable.defvjp(_forward, _backward)


def checked(
    x: Array,
    codes: Array,
    scales: Array,
    zeros: Array | None,
    bits: int,
    codebook: Sequence[float] | None,
    transpose: bool,
) -> Form:
    """How the codes are read; raises ValueError, naming the arguments and their shapes, where they do not fit."""
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: codes have 4 or 8")
    if codes.ndim != 2 or codes.dtype != jnp.uint8 or not codes.size:
        raise ValueError(f"codes are {codes.dtype} of shape {codes.shape}: expected uint8 [outputs, bytes]")
    outputs, inputs = codes.shape[0], codes.shape[1] * 8 // bits
    contracted = outputs if transpose else inputs
    if x.ndim < 1 or x.shape[-1] != contracted or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} of shape {x.shape}, codes have {codes.shape}: expected [..., {contracted}]")
    if scales.ndim != 2 or scales.shape[0] != outputs or not scales.shape[1] or inputs % scales.shape[1]:
        raise ValueError(
            f"scales has shape {scales.shape}, codes {codes.shape}: expected [outputs, blocks of {inputs} inputs]"
        )
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zeros has shape {zeros.shape}, scales {scales.shape}: they must agree")
    if codebook is not None and (zeros is not None or len(codebook) != 2**bits):
        raise ValueError(f"codebook of {len(codebook)} levels for codes of {bits} bits: it needs {2**bits}, no zeros")
    return Form(inputs, bits, None if codebook is None else tuple(float(level) for level in codebook))
