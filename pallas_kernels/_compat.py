"""The differences between jax 0.10, 0.11 and 0.12 that kernels meet."""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

CHIPS = {"NVIDIA H200": 132, "NVIDIA H100 80GB HBM3": 132}
"""Multiprocessors of the GPUs that can be named without being there."""
gpu: Any = plgpu
"""for names and arguments that some of the versions lack"""
LOAD_NEEDS_INDEX = (
    getattr(inspect.signature(plgpu.load).parameters.get("idx"), "default", None) is inspect.Parameter.empty
)
"""jax 0.10; 0.11 warns of it and 0.12 has none"""
_simulation: contextvars.ContextVar[Any] = contextvars.ContextVar("simulation", default=None)


def absent_gpu(device_kind: str = "NVIDIA H200") -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced for one GPU that need not be there."""
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=CHIPS[device_kind], platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def simulates_gpu() -> bool:
    """Whether this jax can run Mosaic GPU kernels on a CPU (0.11 and later)."""
    return hasattr(plgpu, "InterpretGPUParams")


@contextlib.contextmanager
def simulated_gpu(detect_races: bool = True) -> Iterator[None]:
    """A context in which `gpu_kernel` runs on the CPU, threads, copies and barriers simulated; a race raises.

    Raises NotImplementedError where jax is older than 0.11.
    """
    if not simulates_gpu():
        raise NotImplementedError(f"jax {jax.__version__} cannot simulate Mosaic GPU kernels: use 0.11 or later")
    token = _simulation.set(gpu.InterpretGPUParams(detect_races=detect_races))
    try:
        with absent_gpu():
            yield
    finally:
        _simulation.reset(token)


def tpu_simulation(detect_races: bool = True) -> Any:
    """`interpret=` of a Pallas TPU kernel that is to run on the CPU with simulated memories and copies."""
    return pltpu.InterpretParams(detect_races=detect_races)


def gpu_kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    scratch: dict[str, Any],
    grid: dict[str, int],
    warpgroups: int,
    name: str,
) -> Callable[..., Any]:
    """A Mosaic GPU kernel over `grid` (last axis fastest) with `warpgroups` on axis "wg"; scratch comes by keyword."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name=name,
        interpret=_simulation.get() or False,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def gpu_load(ref: Any, layout: Any) -> Array:
    """The whole of a ref in shared or global memory, in registers of `layout`."""
    if LOAD_NEEDS_INDEX:
        return gpu.load(ref, (), layout=layout, optimized=False)
    return gpu.load(ref, layout=layout, optimized=False)


def gpu_add_product(
    total: Float[Array, "m n"], a: Any, b: Any, meanwhile: Callable[[], Any] = lambda: None
) -> tuple[Float[Array, "m n"], Any]:
    """(total + a b, what `meanwhile()` gives), the product running asynchronously; `a` in registers, `b` a shared ref.

    The simulation has no product of registers, nor accumulators with a value: there it is `dot`, and `b` is read again
    after `meanwhile`, so that a buffer given back too early is a race.
    """
    if _simulation.get() is not None:
        b[...]
        done = meanwhile()
        return total + lax.dot(a, b[...], preferred_element_type=jnp.float32), done

    def run(accumulator: Any) -> Any:
        accumulator[...] = total
        plgpu.wgmma(accumulator, a, b)
        done = meanwhile()
        return accumulator[...], done

    return pl.run_scoped(run, gpu.ACC(total.shape, jnp.float32))


def gpu_release(barrier: Any) -> None:
    """Report to `barrier` that this warpgroup has read a shared buffer, which the copy engine may then overwrite.

    The simulation takes products for ordinary reads, and asks for a fence between those and the copy engine. The chip
    needs none: a product reads as the copy engine writes, and an ordinary read is done when its warpgroup arrives.
    """
    if _simulation.get() is not None:
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
