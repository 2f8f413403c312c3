"""Decode attention compiled by the real compilers for chips that are not there."""

import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for
from pallas_kernels.decode_attention import decode_attention

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
WINDOW = {"local_window_size": 1000, "logits_soft_cap": 30.0}


def build(name, batch=4, queries=1, heads=32, kv_heads=8, dims=(128, 128), page=(128, 16), dtype="bfloat16", **options):
    """A decode step and its arguments; `page`: (tokens of a page, pages of a sequence)."""
    cache = [jax.ShapeDtypeStruct((batch * page[1], page[0], kv_heads, dim), jnp.dtype(dtype)) for dim in dims]
    table, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, page[1]), (batch,)))
    query = jax.ShapeDtypeStruct((batch, queries, heads, dims[0]), jnp.dtype(dtype))

    def step(*arrays):
        return decode_attention(*arrays, implementation=name, return_residual=True, **options)

    return step, (query, *cache, table, lengths)


def compiled(target, arguments, **more):
    return compile_for(target, f"{__file__}:build", arguments, **more)


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"queries": 4, "page": (16, 128), **WINDOW},
        {"kv_heads": 1, "page": (4096, 1)},
        {"kv_heads": 4, "page": (1000, 2), "dtype": "float32"},
        {"dims": (256, 256), "heads": 16},
    ],
    ids=["page_128", "page_16_window", "contiguous_mqa", "odd_page_float32", "head_256"],
)
def test_tpu_kernel_compiles_and_copies_no_cache(target, arguments):
    """The custom call is there, and temporary memory is far below that of the cache."""
    report = compiled(target, {"name": "tpu"} | arguments)
    assert [call for calls in report.order.values() for call in calls if "decode_attention" in call]
    cache = sum(math.prod(x.shape) * x.dtype.itemsize for x in build("tpu", **arguments)[1][1:3])
    assert report.temporary_bytes < cache / 8


@pytest.mark.parametrize(
    "arguments",
    [
        {"dims": (64, 64), "page": (64, 32)},
        {},
        {"queries": 16, "page": (16, 128), "dtype": "float16", **WINDOW},
        {"kv_heads": 1, "queries": 4, "page": (1000, 2)},
        {"dims": (192, 128), "page": (8, 200), **WINDOW},
        {"dims": (256, 256), "queries": 4, **WINDOW},
    ],
    ids=["head_64", "head_128", "float16_window", "odd_page_mqa", "mla", "head_256_window"],
)
def test_hopper_kernel_compiles_without_spills(arguments):
    """On the H200: no register is spilled, products are warp-group instructions that are not serialised."""
    report = compiled("h200:1x1x1", {"name": "hopper"} | arguments, report=("registers",))
    (kernel,) = [kernel for kernel in report.kernels if "decode_attention" in kernel.name]
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes, tuple(kernel.notes)) == (0, 0, ())
    assert report.wgmma > 0
    assert report.mma_sync == 0


@pytest.mark.parametrize("target", ["v5p:2x2x1", "h200:1x1x1"])
def test_xla_compiles(target):
    compiled(target, {"name": "xla", **WINDOW})
