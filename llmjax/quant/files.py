"""Matrices of other libraries' quantised checkpoints as quantised tensors, bit for bit: tensors in, tensor out.

bitsandbytes 4-bit: `weight` holds the packed codes of the flat torch weight; beside it stand `absmax` (with double
quantisation uint8, and `nested_absmax`), the maps, and a JSON text of the rest.
GPTQ: `qweight` int32 `[inputs bits / 32, outputs]`, little-endian streams of codes along the inputs; `qzeros` along the
outputs, less one in its first format; `scales` `[groups, outputs]`; `g_idx`, the group of every input.
AWQ: `qweight` int32 `[inputs, outputs / 8]`, the nibbles of a word holding columns 0, 2, 4, 6, 1, 3, 5, 7; `qzeros`
alike.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from llmjax.config import InputError
from llmjax.quant.double import GROUP, DoubleScales, dynamic_map
from llmjax.quant.formats import Format
from llmjax.quant.fp4 import FP4
from llmjax.quant.integers import Integer
from llmjax.quant.method import RTN, Statistics
from llmjax.quant.nf4 import NF4
from llmjax.quant.tensor import Layout, QTensor, stored

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Reordered(RTN):
    """Round to nearest, in the form of GPTQ's act-order: the inputs have an order, drawn matrices their own."""

    def quantise(
        self, w: Float[Array, "outputs inputs"], seen: Statistics | None, form: Format, layout: Layout
    ) -> QTensor:
        """As RTN, with the order 0, 1, 2 and so on."""
        return replace(super().quantise(w, seen, form, layout), order=jnp.arange(layout.rows, dtype=jnp.int32))


def from_bitsandbytes(tensors: Tensors, layout: Layout) -> QTensor:
    """The tensors of one weight, named as behind `<path>.weight`: "" (the codes), "absmax", "quant_map" and so on.

    Raises InputError for missing tensors, another kind, map or shape than ours.
    """
    (key, kind) = _kind(tensors)
    state = _json(tensors[key])
    form = (NF4 if kind == "nf4" else FP4)(block=state["blocksize"])
    _require(_same(_tensor(tensors, "quant_map"), np.asarray(form.levels)), f"quant_map is not that of {kind}")
    shape = shape_of_bitsandbytes(tensors)
    _require(shape == (layout.columns, layout.rows), f"weight {shape} is not {(layout.columns, layout.rows)}")
    size, count = form.size(layout.rows, layout.columns), layout.rows * layout.columns
    rows = layout.columns if layout.rows % size == 0 else 1
    scales = _tensor(tensors, "absmax")
    _require(scales.size == -(-count // size), f"absmax holds {scales.size} scales, not {-(-count // size)}")
    data = _tensor(tensors, "").reshape(-1).view(np.uint8)
    _require(data.size == -(-count // 2), f"the weight holds {data.size} bytes, not {-(-count // 2)}")
    scales, blocks = scales.reshape(rows, -1), scales.size
    codes = jnp.asarray(data.reshape(1 if layout.rows % 2 else layout.columns, -1))
    if "nested_absmax" not in tensors:
        return QTensor(codes, jnp.asarray(scales), None, form, layout)
    _require(_same(_tensor(tensors, "nested_quant_map"), dynamic_map()), "nested_quant_map is unknown")
    absmax, mean = _tensor(tensors, "nested_absmax"), state.get("nested_offset")
    _require(type(mean) is float, f"quant_state: nested_offset={mean!r}, wanted a number")
    fits = state.get("nested_blocksize") == GROUP and absmax.size == -(-blocks // GROUP)
    _require(fits, f"nested_absmax must hold a scale for every {GROUP} scales")
    double = type(form)(block=form.block, double=True)
    return QTensor(
        codes, DoubleScales(jnp.asarray(scales), jnp.asarray(absmax), jnp.float32(mean)), None, double, layout
    )


def shape_of_bitsandbytes(tensors: Tensors) -> tuple[int, int]:
    """Outputs and inputs of a weight; raises InputError where its state does not tell them."""
    shape = _json(tensors[_kind(tensors)[0]])["shape"]
    _require(len(shape) == 2 and all(type(n) is int and n > 0 for n in shape), f"quant_state: shape={shape}")
    return shape[0], shape[1]


def _kind(tensors: Tensors) -> tuple[str, str]:
    for kind in ("nf4", "fp4"):
        if f"quant_state.bitsandbytes__{kind}" in tensors:
            return f"quant_state.bitsandbytes__{kind}", kind
    raise InputError("no quant_state.bitsandbytes__nf4 or __fp4 beside the weight: not a 4-bit weight of bitsandbytes")


def _json(data: Shaped[np.ndarray, "..."]) -> dict[str, Any]:
    try:
        state = json.loads(data.astype(np.uint8).tobytes())
    except ValueError:
        raise InputError("quant_state is not a JSON text") from None
    _require(isinstance(state, dict), "quant_state is not a JSON object")
    for name, kind in {"blocksize": int, "shape": list}.items():
        _require(type(state.get(name)) is kind, f"quant_state: {name}={state.get(name)!r}, wanted a {kind.__name__}")
    _require(state["blocksize"] > 0, f"quant_state: blocksize={state['blocksize']}, wanted more than 0")
    return state


def _tensor(tensors: Tensors, name: str) -> Shaped[np.ndarray, "..."]:
    if name not in tensors:
        raise InputError(f"tensor {name or 'weight'} is missing beside {', '.join(sorted(filter(None, tensors)))}")
    return np.asarray(tensors[name])


def _same(found: Shaped[np.ndarray, "..."], wanted: Shaped[np.ndarray, "..."]) -> bool:
    return found.shape == wanted.shape and np.allclose(found, wanted, atol=1e-6)


def _require(fits: bool | np.bool_, what: str) -> None:
    if not fits:
        raise InputError(what)


def from_gptq(tensors: Tensors, layout: Layout, bits: int = 4, first_format: bool = True) -> QTensor:
    """The tensors `qweight`, `qzeros`, `scales` and, where there is one, `g_idx`.

    In the first format of the files, zero points are stored less one. Inputs in the order of their groups need no
    permutation; others (act-order) get one. Raises InputError where shapes do not fit.
    """
    _require(bits in (2, 3, 4, 8), f"bits={bits}: GPTQ files have 2, 3, 4 or 8")
    words, scales = _tensor(tensors, "qweight"), _tensor(tensors, "scales")
    groups = scales.shape[0]
    _require(scales.shape[1:] == (layout.columns,), f"scales {scales.shape} do not fit {layout.columns} outputs")
    _require(layout.rows % groups == 0, f"{groups} groups do not divide {layout.rows} inputs")
    _require(words.shape == (layout.rows * bits // 32, layout.columns), f"qweight {words.shape} does not fit {layout}")
    codes = little_endian(words.T, bits)
    zeros = little_endian(_tensor(tensors, "qzeros"), bits)
    _require(zeros.shape == scales.shape, f"qzeros stand for {zeros.shape}, scales are {scales.shape}")
    if first_format:
        zeros = (zeros + 1).astype(np.uint8)
    index, size = (
        np.asarray(tensors.get("g_idx", np.arange(layout.rows) // (layout.rows // groups))),
        layout.rows // groups,
    )
    _require(index.shape == (layout.rows,) and index.min() >= 0, f"g_idx is no group for each of {layout.rows} inputs")
    _require(np.array_equal(np.bincount(index, minlength=groups), np.full(groups, size)), "g_idx has uneven groups")
    order = np.argsort(index, kind="stable")
    plain = np.array_equal(order, np.arange(layout.rows))
    form = Integer(bits=bits, block=size, zero_point="integer")
    tensor = stored(jnp.asarray(codes[:, order]), jnp.asarray(scales.T), jnp.asarray(zeros.T), form, layout)
    return tensor if plain else replace(tensor, order=jnp.asarray(order, jnp.int32))


def from_awq(tensors: Tensors, layout: Layout) -> QTensor:
    """The tensors `qweight`, `qzeros` and `scales` of 4 bits. Raises InputError where shapes do not fit."""
    scales = _tensor(tensors, "scales")
    codes, zeros = (interleaved(_tensor(tensors, name)) for name in ("qweight", "qzeros"))
    _require(codes.shape == (layout.rows, layout.columns), f"qweight stands for {codes.shape}, wanted {layout}")
    _require(zeros.shape == scales.shape, f"qzeros stand for {zeros.shape}, scales are {scales.shape}")
    groups = scales.shape[0]
    _require(layout.rows % groups == 0, f"{groups} groups do not divide {layout.rows} inputs")
    form = Integer(bits=4, block=layout.rows // groups, zero_point="integer")
    return stored(jnp.asarray(codes.T), jnp.asarray(scales.T), jnp.asarray(zeros.T), form, layout)


def little_endian(words: Int[np.ndarray, "rows words"], bits: int) -> UInt8[np.ndarray, "rows codes"]:
    """Codes of `bits` bits from int32 words: the first in the lowest bits, running across words."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return (data[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(words.shape[0], -1)
    stream = np.unpackbits(data, axis=-1, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (stream.reshape(words.shape[0], -1, bits) * weights).sum(-1, dtype=np.uint8)


def interleaved(words: Int[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows codes"]:
    """Columns of 4 bits from int32 words whose nibbles hold them in the order `INTERLEAVED`."""
    nibbles = little_endian(words, 4).reshape(words.shape[0], -1, 8)
    return nibbles[..., np.argsort(INTERLEAVED)].reshape(words.shape[0], -1)
