"""Quantised weights of model folders: what `quantization_config` says, and the tensors that make up one weight.

`quant_method` gptq, awq and bitsandbytes (4 bits) are read: codes and scales are taken over, nothing is rounded again.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmjax.config import InputError
from llmjax.models.settings import require, setting
from llmjax.quant import files
from llmjax.quant.formats import Format
from llmjax.quant.fp4 import FP4
from llmjax.quant.integers import Integer
from llmjax.quant.method import RTN
from llmjax.quant.nf4 import NF4
from llmjax.quant.quantize import Quantize
from llmjax.quant.tensor import Layout, QTensor

BESIDE = re.compile(r"(.*\.weight)\.(.+)")
INSTEAD = re.compile(r"(.*\.)(qweight|qzeros|scales|g_idx)")


@dataclass(frozen=True)
class Scheme:
    """How the quantised weights of a folder are written."""

    quantize: Quantize
    """format, and whether the inputs have an order"""
    read: Callable[[files.Tensors, Layout], QTensor]
    """one weight from its tensors"""
    shape: Callable[[files.Tensors], tuple[int, int]]
    """outputs and inputs, from its tensors"""
    part: re.Pattern[str]
    """names of the tensors: those of a weight up to the first group, and which it is in the second"""


@dataclass(frozen=True)
class Packed:
    """A quantised weight of a file, not read yet; to the tables it is of the shape that it stands for."""

    parts: files.Tensors
    scheme: Scheme
    shape: tuple[int, int]
    dtype: np.dtype[Any] = np.dtype(np.float32)

    def read(self, wanted: QTensor) -> QTensor:
        """The matrix, in the format and the static parts of `wanted`; raises InputError where it has others."""
        alone = replace(wanted.layout, batch=())
        found = self.scheme.read(self.parts, alone)
        if wanted.order is not None and found.order is None:
            found = replace(found, order=jnp.arange(alone.rows, dtype=jnp.int32))
        sizes = [form.size(alone.rows, alone.columns) for form in (found.format, wanted.format)]
        if sizes[0] == sizes[1]:
            found = replace(found, format=replace(found.format, block=wanted.format.block))
        found = replace(found, layout=wanted.layout, activations=wanted.activations, kind=wanted.kind)
        if static(found) != static(wanted):
            order = " of inputs in an order of their own" if found.order is not None else ""
            raise InputError(f"holds {found.format}{order}, where the config says {wanted.format}")
        return found


def static(tensor: QTensor) -> tuple[Any, ...]:
    """What tensors must share to be parts of one stack."""
    return tensor.format, tensor.rotated, tensor.order is None, tensor.gain is None


def scheme_of(theirs: Mapping[str, Any]) -> Scheme | None:
    """What a config.json says of quantised weights; None where there are none.

    Raises InputError for another method than those that are read, and for settings of these that are not.
    """
    settings = theirs.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise InputError(f"config.json: quantization_config={settings!r}: expected an object")
    older = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else None
    method = settings.get("quant_method", older)
    if method not in SCHEMES:
        raise InputError(f"config.json: quant_method={method!r} is not supported: {', '.join(SCHEMES)} are")
    return SCHEMES[method](settings)


def gptq(settings: Mapping[str, Any]) -> Scheme:
    """Integers with a zero point; with `desc_act` groups are of inputs in an order of their own."""
    bits, group = setting(settings, "bits", 4), setting(settings, "group_size", 128)
    if bits not in (2, 3, 4, 8):
        raise InputError(f"config.json: bits={bits} is not supported: 2, 3, 4 and 8 are")
    version = setting(settings, "checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise InputError(f"config.json: checkpoint_format={version!r} is not supported: gptq and gptq_v2 are")
    if settings.get("dynamic"):
        raise InputError("config.json: dynamic is not supported: all weights must be of one format")
    method = files.Reordered() if setting(settings, "desc_act", False) else RTN()

    def shape(tensors: files.Tensors) -> tuple[int, int]:
        rows, columns = matrix(tensors, "qweight")
        return columns, rows * 32 // bits

    read = partial(files.from_gptq, bits=bits, first_format=version == "gptq")
    return Scheme(Quantize(Integer(group_of(group), bits=bits, zero_point="integer"), method), read, shape, INSTEAD)


def awq(settings: Mapping[str, Any]) -> Scheme:
    """Integers of 4 bits with a zero point."""
    require({**settings, "version": setting(settings, "version", "gemm").lower()}, version="gemm")
    require(settings, bits=4, w_bit=4, zero_point=True)
    group = setting(settings, "group_size", 128)

    def shape(tensors: files.Tensors) -> tuple[int, int]:
        rows, columns = matrix(tensors, "qweight")
        return columns * 8, rows

    form = Integer(group_of(group), bits=4, zero_point="integer")
    return Scheme(Quantize(form), files.from_awq, shape, INSTEAD)


def bitsandbytes(settings: Mapping[str, Any]) -> Scheme:
    """NF4 or FP4 in blocks of 64."""
    require(settings, load_in_8bit=False, load_in_4bit=True)
    kinds: dict[str, Callable[..., Format]] = {"nf4": NF4, "fp4": FP4}
    kind = setting(settings, "bnb_4bit_quant_type", "fp4")
    if kind not in kinds:
        raise InputError(f"config.json: bnb_4bit_quant_type={kind!r} is not supported: {', '.join(kinds)} are")
    form = kinds[kind](block=64, double=setting(settings, "bnb_4bit_use_double_quant", False))
    return Scheme(Quantize(form), files.from_bitsandbytes, files.shape_of_bitsandbytes, BESIDE)


SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {"gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes}


def group_of(size: int) -> Any:
    """The block of a format; -1 is all inputs of an output."""
    if size == -1:
        return "channel"
    if size < 1:
        raise InputError(f"config.json: group_size={size}: must be at least 1, or -1 for all inputs")
    return size


def matrix(tensors: files.Tensors, name: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix."""
    found = tensors[name].shape if name in tensors else ()
    if len(found) != 2 or not math.prod(found):
        raise InputError(f"{name} is {list(found) if found else 'missing'}, wanted a matrix")
    return found[0], found[1]


def packed(tensors: Mapping[str, np.ndarray], scheme: Scheme) -> dict[str, np.ndarray | Packed]:
    """The tensors of a folder, those of a quantised weight as one under the weight's name.

    Raises InputError where such a weight is not of the scheme.
    """
    whole: dict[str, Any] = dict(tensors)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors:
        found = scheme.part.fullmatch(name)
        if found is not None:
            weight = found[1].removesuffix("weight") + "weight"
            parts.setdefault(weight, {})[found[2]] = whole.pop(name)
    for name, own in parts.items():
        if name in whole:
            own[""] = whole.pop(name)
        try:
            whole[name] = Packed(own, scheme, scheme.shape(own))
        except InputError as error:
            raise InputError(f"tensor {name}: {error}") from None
    return whole
