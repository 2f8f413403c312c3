"""The implementations of attention: where each can run, what it refuses, and in which order they are tried."""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels import chips, dispatch
from pallas_kernels.attention import cudnn, tiled
from pallas_kernels.attention.call import Call
from pallas_kernels.attention.mask import Rule, allowed, ends
from pallas_kernels.attention.reference import definition
from pallas_kernels.attention.vjp import Kernel, Operands, Visible, blockwise
from pallas_kernels.attention.xla import xla_attention
from pallas_kernels.dispatch import everywhere, on_hopper, on_tpu
from pallas_kernels.tuned import tuned

Result = tuple[Array, Array | None]


@dataclass(frozen=True)
class Backend:
    """One implementation."""

    summary: str
    runs_on: Callable[[str, str], bool]
    """of (platform, device kind)"""
    refusal: Callable[[Call], str | None]
    run: Callable[[Call], Result]
    """(output [batch, query_length, heads, value_dim], log-sum-exp [batch, heads, query_length] or None)"""


def reference_refusal(call: Call) -> str | None:
    """Only block sizes: it has none."""
    return "has no block sizes to configure" if call.config is not None else None


def run_reference(call: Call) -> Result:
    """The definition."""
    query, key, value, bias, sinks = call.operands
    mask = allowed(call.rule, ends(call.visible.seen, (query.shape[1], key.shape[1])))[:, None]
    mask = mask if call.visible.dense is None else mask & call.visible.dense
    return definition(query, key, value, bias, mask, sinks, call.rule.scale, call.rule.soft_cap)


def xla_refusal(call: Call) -> str | None:
    """Nothing but another implementation's block sizes."""
    return wrong_config(call, tiled.Config)


def run_xla(call: Call) -> Result:
    """Blocks or tiles in plain XLA."""
    return xla_attention(call.operands, call.visible, call.rule, call.config)


def wrong_config(call: Call, config: type) -> str | None:
    """Complain about block sizes of another implementation."""
    fits = call.config is None or isinstance(call.config, config)
    return None if fits else f"takes config of type {config.__module__}.Config, not {type(call.config).__module__}"


@functools.cache
def kernel_module(name: str) -> ModuleType:
    """A kernel's module, imported when it is first needed: Pallas takes longer to import than all the rest."""
    return importlib.import_module(f"pallas_kernels.attention.{name}")


@functools.cache
def passes(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward pass of a kernel module in the form that the shared gradient takes."""
    module = kernel_module(name)

    def forward(operands: Operands, visible: Visible, rule: Rule, config: Any) -> tuple[Array, Array]:
        query, key, value, _, sinks = operands
        return module.forward(query, key, value, sinks, visible.seen, rule, config)

    def backward(
        operands: Operands, visible: Visible, lse: Array, delta: Array, d_out: Array, rule: Rule, config: Any
    ) -> tuple[Array, Array, Array, None]:
        arrays = (operands.query, operands.key, operands.value, lse, delta, d_out)
        return *module.backward(*arrays, visible.seen, rule, config), None

    return forward, backward


def kernel_refusal(name: str, call: Call) -> str | None:
    """What a kernel module refuses, and what no kernel takes."""
    if call.operands.bias is not None:
        return "takes no bias"
    if call.visible.dense is not None:
        return "takes no dense mask"
    module = kernel_module(name)
    query, key, value, _, sinks = call.operands
    reason = module.refusal(query, key, value, call.rule, call.visible.seen, sinks)
    return reason or wrong_config(call, module.Config)


def run_kernel(name: str, call: Call) -> Result:
    """A kernel with the block sizes asked for, those found by tuning, or the heuristic's."""
    module = kernel_module(name)
    query, key, value, _, _ = call.operands
    config = call.config
    if config is None:
        shapes = (query.shape, key.shape, value.shape)
        found = tuned(f"attention_{name}", chips.target()[1], *shapes, query.dtype, call.rule.causal)
        config = module.heuristic(*shapes, query.dtype, call.rule) if found is None else module.Config(**found)
    return blockwise(Kernel(*passes(name), call.rule, config), call.operands, call.visible)


def backend_of(name: str, summary: str, runs_on: Callable[[str, str], bool]) -> Backend:
    """The backend of a kernel module."""
    return Backend(summary, runs_on, functools.partial(kernel_refusal, name), functools.partial(run_kernel, name))


def on_gpu(platform: str, device: str) -> bool:
    """A GPU that is there: whether cuDNN can do it is asked of the library on the machine."""
    return platform == "gpu" == jax.default_backend()


BACKENDS = {
    "tpu": backend_of("tpu", "Pallas Mosaic for TPU", on_tpu),
    "cudnn": Backend("cuDNN through jax.nn", on_gpu, cudnn.refusal, cudnn.run),
    "xla": Backend("plain XLA, blockwise", everywhere, xla_refusal, run_xla),
    "hopper": backend_of("hopper", "Pallas Mosaic GPU for sm_90a", on_hopper),
    "reference": Backend("the definition, float32 or float64", everywhere, reference_refusal, run_reference),
}
"""In the order in which `implementation=None` tries them: the Hopper kernel, run by no chip yet, must be asked for."""


def choose(call: Call, implementation: str | Sequence[str] | None) -> Backend:
    """The implementation that makes this call; raises ValueError or NotImplementedError with the reasons."""
    return BACKENDS[dispatch.choose("attention", BACKENDS, implementation, lambda name: BACKENDS[name].refusal(call))]
