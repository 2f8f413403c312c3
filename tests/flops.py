"""Arithmetic of a traced function, counted from its jaxpr: products, convolutions, transforms and elementwise work.

A scan counts its body as often as it runs. A `while` has no count in the jaxpr: `count` raises for it.
"""

import math
from typing import Any

import jax

FREE = {
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "squeeze",
    "slice",
    "concatenate",
    "convert_element_type",
    "copy",
    "stop_gradient",
    "iota",
    "pad",
    "rev",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "scatter",
    "split",
    "bitcast_convert_type",
    "sharding_constraint",
    "optimization_barrier",
    "expand_dims",
    "random_wrap",
    "random_unwrap",
}
"""Primitives that move data."""


def flops(function: Any, *arguments: Any) -> float:
    """Floating-point operations of `function(*arguments)`; arguments may be shapes."""
    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def count(jaxpr: Any) -> float:
    """Operations of a jaxpr; raises ValueError for loops whose length is not written in it."""
    return sum(one(equation) for equation in jaxpr.eqns)


def one(equation: Any) -> float:
    """Operations of one equation, those of the functions it calls included."""
    name, params = equation.primitive.name, equation.params
    shapes = [v.aval for v in equation.invars]
    out = sum(math.prod(v.aval.shape) for v in equation.outvars)
    if name == "while":
        raise ValueError("a while loop does not say how often it runs")
    if name == "scan":
        return params["length"] * count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(count(branch.jaxpr) for branch in params["branches"])
    inner = [p for value in params.values() for p in (value if isinstance(value, tuple | list) else (value,))]
    bodies = [getattr(p, "jaxpr", p) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns")]
    if bodies:
        return count(bodies[0])  # a custom gradient holds its function first
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        return 2.0 * out * math.prod(shapes[0].shape[i] for i in contracted)
    if name == "ragged_dot_general":
        return 2.0 * out * shapes[0].shape[-1]
    if name == "conv_general_dilated":
        return 2.0 * out * math.prod(shapes[1].shape) / shapes[1].shape[params["dimension_numbers"].rhs_spec[0]]
    if name == "fft":
        length = math.prod(params["fft_lengths"])
        return 5.0 * max(out, math.prod(shapes[0].shape)) * math.log2(max(length, 2))
    if name == "sort":
        return out * math.log2(max(shapes[0].shape[-1], 2))
    if name.startswith(("reduce_", "cum", "arg")):
        return float(math.prod(shapes[0].shape))
    return 0.0 if name in FREE else float(out)
