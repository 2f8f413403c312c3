"""The table of scans in pallas_kernels/README.md: what each implementation takes, asked by tracing calls of it.

`python -m scripts.scan_table` writes it there; a test compares. No chip need be there: nothing is compiled.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as kernels
from pallas_kernels.dispatch import ModuleBackend
from pallas_kernels.gated_delta_rule import registry as delta
from pallas_kernels.gated_linear_attention import registry as linear
from pallas_kernels.linear_recurrence import registry as recurrence
from pallas_kernels.selective_scan import registry as selective
from scripts.support_table import DTYPES, write

BEGIN, END = "<!-- table of scans -->", "<!-- end of the table of scans -->"
CHIPS = {("tpu", "TPU v5"): "tpu", ("gpu", "NVIDIA H200"): "hopper"}
"""A chip of each platform that kernels are written for."""
BATCH, LENGTH, HEADS, DIM, STATE = 2, 128, 4, 64, 16
ARRAYS: dict[str, tuple[int, ...]] = {
    "rows": (BATCH, LENGTH),
    "heads": (BATCH, LENGTH, HEADS),
    "keys": (BATCH, LENGTH, HEADS, DIM),
    "state": (BATCH, HEADS, DIM, DIM),
    "channels": (BATCH, LENGTH, DIM),
}
Options = dict[str, Any]


def zeros(name: str, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape of an array of ARRAYS."""
    return jax.ShapeDtypeStruct(ARRAYS[name], dtype)


def selective_scan(dtype: Any = jnp.bfloat16, state: int = STATE, groups: int = 1, **more: Any) -> Options:
    """The arguments of a call of Mamba's scan."""
    shared = jax.ShapeDtypeStruct((BATCH, LENGTH, groups, state), dtype)
    x = zeros("channels", dtype)
    return dict(x=x, dt=x, A=jax.ShapeDtypeStruct((DIM, state), jnp.float32), B=shared, C=shared, **more)


def ssd(dtype: Any = jnp.bfloat16, groups: int = 1, **more: Any) -> Options:
    """The arguments of a call of Mamba-2's scan."""
    shared = jax.ShapeDtypeStruct((BATCH, LENGTH, groups, DIM), dtype)
    A = jax.ShapeDtypeStruct((HEADS,), jnp.float32)
    return dict(x=zeros("keys", dtype), dt=zeros("heads"), A=A, B=shared, C=shared, **more)


def attention(dtype: Any = jnp.bfloat16, groups: int = HEADS, dim: int = DIM, **more: Any) -> Options:
    """The arguments of a call of gated linear attention."""
    shared = jax.ShapeDtypeStruct((BATCH, LENGTH, groups, dim), dtype)
    return dict(query=shared, key=shared, value=jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, dim), dtype), **more)


def delta_rule(dtype: Any = jnp.bfloat16, **more: Any) -> Options:
    """The arguments of a call of the delta rule."""
    return attention(dtype, **more) | {"beta": zeros("heads")}


ALL = {name: {"dtype": dtype} for name, dtype in DTYPES.items()}
ALL["packed rows"] = {"segment_ids": jax.ShapeDtypeStruct(ARRAYS["rows"], jnp.int32)}
DECAYS: dict[str, Options] = {
    "one decay a head": {"log_decay": zeros("heads")},
    "one decay a key dimension": {"log_decay": zeros("keys")},
    "keys shared by the heads": {"groups": 1},
    "initial state": {"initial_state": zeros("state")},
    "dims of 256": {"dim": 256},
}
CALLS: dict[str, tuple[Callable[..., Options], dict[str, ModuleBackend], dict[str, Options]]] = {
    "selective_scan": (
        selective_scan,
        selective.BACKENDS,
        {
            "gate, skip, softplus": {
                "z": zeros("channels", jnp.bfloat16),
                "D": jax.ShapeDtypeStruct((DIM,), jnp.float32),
                "dt_softplus": True,
            },
            "groups of B and C": {"groups": 2},
            "initial state": {"initial_state": jax.ShapeDtypeStruct((BATCH, DIM, STATE), jnp.float32)},
            "reverse": {"reverse": True},
            "256 states": {"state": 256},
        },
    ),
    "ssd": (ssd, linear.BACKENDS, {"groups of B and C": {"groups": 2}, "initial state": DECAYS["initial state"]}),
    "gated_linear_attention": (
        attention,
        linear.BACKENDS,
        DECAYS | {"bonus": {"bonus": jax.ShapeDtypeStruct((HEADS, DIM), jnp.float32)}},
    ),
    "gated_delta_rule": (delta_rule, delta.BACKENDS, DECAYS),
}
"""function: what makes its arguments, its implementations, the features beside dtypes and packed rows"""


def takes(function: str, name: str, **options: Any) -> bool:
    """Whether an implementation takes a call with these features."""
    arguments = CALLS[function][0](**options)
    platform, kind = next((chip for chip, kernel in CHIPS.items() if kernel == name), ("cpu", "cpu"))
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    arrays = {key: value for key, value in arguments.items() if isinstance(value, jax.ShapeDtypeStruct)}
    rest = {key: value for key, value in arguments.items() if key not in arrays}
    call = functools.partial(getattr(kernels, function), implementation=name, **rest)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        try:
            jax.eval_shape(lambda arrays: call(**arrays), arrays)
        except NotImplementedError:
            return False
    return True


def table() -> str:
    """The table in Markdown: a column an implementation, a row a feature of a function."""
    names = list(linear.BACKENDS | selective.BACKENDS)
    rows = [["", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 1)]
    for function, (_, backends, features) in CALLS.items():
        rows.append([f"**{function}**", *("" for _ in names)])
        for feature, options in (ALL | features).items():
            answers = (name in backends and takes(function, name, **options) for name in names)
            rows.append([feature, *("yes" if answer else "-" for answer in answers)])
    rows.append(["**linear_recurrence**", *("yes" if name in recurrence.BACKENDS else "-" for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    write(BEGIN, END, table())
