"""Small programs for `pallas_kernels._aot`, as its children load them: each builder gives (function, arguments)."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def matmul(side):
    x = shaped(side, side, dtype=jnp.bfloat16)
    return jnp.matmul, (x, x)


def tpu_kernel(rows, copies=1):
    """`copies` times the same kernel: exp(a) @ b, 256 rows a step."""

    def kernel(a, b, out):
        out[...] = jnp.exp(a[...]) @ b[...]

    block, whole = pl.BlockSpec((256, 512), lambda i: (i, 0)), pl.BlockSpec((512, 512), lambda i: (0, 0))
    out = shaped(rows, 512)
    call = pl.pallas_call(
        kernel, grid=(rows // 256,), in_specs=[block, whole], out_specs=block, out_shape=out, name="tiny"
    )

    def chain(a, b):
        for _ in range(copies):
            a = call(a, b)
        return a

    return chain, (out, shaped(512, 512))


def tpu_too_large():
    """A kernel that wants 512 MB of the core's memory."""
    x = shaped(8192, 8192)
    return pl.pallas_call(lambda a, out: out.__setitem__(..., a[...] + 1), out_shape=x), (x,)


def gpu_kernel(width):
    """A Mosaic GPU loop that holds three rows of `width` numbers a thread: beyond 255 registers it must spill."""
    layout = plgpu.Layout.WG_STRIDED((128 * width,), vec_size=min(width, 8))

    def kernel(x_ref, out_ref):
        x = plgpu.layout_cast(x_ref[...], layout)
        step = lambda _, c: (jnp.exp2(c[0]) + c[1] * x, c[1] + x * c[0])
        left, right = jax.lax.fori_loop(0, 8, step, (x, x * 2.0))
        out_ref[...] = left * right

    return mosaic(kernel, shaped(128 * width), "rows"), (shaped(128 * width),)


def gpu_product(columns, sums=1):
    """A 64 x columns x 64 product on Hopper's tensor cores, `sums` times: 4 wgmma instructions of depth 16 each."""
    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    shared = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=tiles)

    def kernel(a_ref, b_ref, out_ref, a, b, arrived):
        plgpu.copy_gmem_to_smem(a_ref, a, arrived)
        plgpu.copy_gmem_to_smem(b_ref, b, arrived)
        plgpu.barrier_wait(arrived)

        def multiply(*totals):
            for total in totals:
                plgpu.wgmma(total, a, b)
            return functools.reduce(jnp.add, [total[...] for total in totals])

        out_ref[...] = pl.run_scoped(multiply, *[plgpu.ACC((64, columns), jnp.float32)] * sums)

    scratch = [shared(64, 64), shared(64, columns), plgpu.Barrier(num_arrivals=2)]
    arguments = (shaped(64, 64, dtype=jnp.bfloat16), shaped(64, columns, dtype=jnp.bfloat16))
    return mosaic(kernel, shaped(64, columns), "product", scratch), arguments


def mosaic(kernel, out, name, scratch=()):
    lane = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    return plgpu.kernel(kernel, out_type=out, scratch_types=list(scratch), kernel_name=name, compiler_params=lane)


def ring(devices, side):
    """Two collectives whose order the data fixes: a permute, then a sum over all devices."""
    mesh = Mesh(np.array(devices), ("ring",), axis_types=(AxisType.Auto,))
    steps = [(i, (i + 1) % len(devices)) for i in range(len(devices))]
    body = lambda x: jax.lax.psum(jnp.tanh(jax.lax.ppermute(x, "ring", steps)), "ring")
    split = PartitionSpec("ring")
    function = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=PartitionSpec(None), check_vma=False)
    x = jax.ShapeDtypeStruct((len(devices) * side, side), jnp.float32, sharding=NamedSharding(mesh, split))
    return function, (x,)


def dies():
    os.abort()


def hungry():
    np.ones(2**28)
