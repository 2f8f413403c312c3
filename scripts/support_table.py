"""The table of pallas_kernels/README.md: what each implementation of attention takes, asked of the implementations.

`python -m scripts.support_table` writes it there; a test compares.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.attention.api import checked
from pallas_kernels.attention.call import Call
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.registry import BACKENDS
from pallas_kernels.attention.vjp import Operands

README = Path(__file__).resolve().parent.parent / "pallas_kernels" / "README.md"
BEGIN, END = "<!-- support table -->", "<!-- end of the support table -->"
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
DIMS = (64, 96, 128, 192, 256)
BATCH, LENGTH, HEADS = 2, 256, 4
IDS = jnp.zeros((BATCH, LENGTH), jnp.int32)
COUNTS = jnp.full(BATCH, LENGTH, jnp.int32)
CAUSAL = Mask(is_causal=True)

FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"mask": Mask()},
    "GQA": {"kv_heads": 2},
    "window": {"mask": CAUSAL & Mask(local_window_size=(63, 0))},
    "two-sided window": {"mask": Mask(local_window_size=(32, 32))},
    "segments": {"mask": CAUSAL & Mask(segment_ids=IDS)},
    "positions": {"mask": CAUSAL & Mask(positions=IDS)},
    "lengths": {"mask": CAUSAL & Mask(query_seq_lengths=COUNTS, key_value_seq_lengths=COUNTS)},
    "soft cap": {"soft_cap": 30.0},
    "sinks": {"sinks": True},
    "bias": {"bias": True},
    "dense mask": {"mask": Mask(dense=jnp.ones((1, 1, LENGTH, LENGTH), bool))},
    "log-sum-exp": {"residual": True},
    "MLA 192/128": {"dims": (192, 128)},
}


def call(
    *,
    mask: Mask = CAUSAL,
    kv_heads: int = HEADS,
    dims: tuple[int, int] = (128, 128),
    dtype: Any = jnp.bfloat16,
    soft_cap: float | None = None,
    sinks: bool = False,
    bias: bool = False,
    residual: bool = False,
) -> Call:
    """A call with these features, all zeros."""
    query, key, value = (
        jnp.zeros((BATCH, LENGTH, heads, dim), dtype)
        for heads, dim in ((HEADS, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]))
    )
    scores = jnp.zeros((BATCH, HEADS, LENGTH, LENGTH), dtype) if bias else None
    operands = Operands(query, key, value, scores, jnp.zeros(HEADS) if sinks else None)
    return replace(checked(operands, mask, None, soft_cap), residual=residual)


def takes(name: str, **features: Any) -> bool:
    """Whether an implementation takes a call with these features."""
    return BACKENDS[name].refusal(call(**features)) is None


def table() -> str:
    """The table in Markdown: a column an implementation, a row a feature."""
    names = list(BACKENDS)
    rows = [["", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 1)]
    rows.append(["", *(BACKENDS[name].summary for name in names)])
    for feature, options in FEATURES.items():
        rows.append([feature, *("yes" if takes(name, **options) else "-" for name in names)])
    rows.append(["dtype", *(", ".join(d for d, t in DTYPES.items() if takes(n, dtype=t)) for n in names)])
    rows.append(["head_dim", *(", ".join(str(d) for d in DIMS if takes(n, dims=(d, d))) for n in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(begin: str, end: str, table: str) -> None:
    """Put a table between its marks in the README."""
    text = README.read_text()
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    README.write_text(f"{head}{begin}\n\n{table}\n\n{end}{tail}")


if __name__ == "__main__":
    write(BEGIN, END, table())
