"""What runs in the subprocess: build the function, compile it for devices that are not there, write the result down.

`python -m pallas_kernels._aot.child FOLDER` reads `request.json` there and leaves `result.json`; the compiler leaves
its dumps in the same folder.
"""

import importlib
import inspect
import json
import resource
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.chips import absent_devices


def load(builder: str) -> Callable[..., Any]:
    """The function "package.module:name" or "path/file.py:name"."""
    where, _, name = builder.rpartition(":")
    if where.endswith(".py"):
        return runpy.run_path(where)[name]
    return getattr(importlib.import_module(where), name)


def lower(request: dict[str, Any]) -> jax.stages.Lowered:
    """Call the builder and lower its function on the first absent device, or as its arguments' shardings say."""
    devices = absent_devices(request["target"])
    builder = load(request["builder"])
    given = {"devices": devices} if "devices" in inspect.signature(builder).parameters else {}
    function, arguments = builder(**request["arguments"], **given)
    placed = [leaf.sharding.mesh for leaf in jax.tree.leaves(arguments) if getattr(leaf, "sharding", None) is not None]
    mesh = placed[0] if placed else Mesh(np.array(devices[:1]), ("device",))

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    jitted = function if hasattr(function, "lower") else jax.jit(function)
    arguments = jax.tree.map(place, tuple(arguments))
    # Some lowering rules ask for the device; a mesh of absent devices breaks eager operations, so it comes last.
    jax.set_mesh(mesh)
    return jitted.lower(*arguments)


def main(folder: Path) -> None:
    """Compile what `folder/request.json` asks for; write `folder/result.json` and `folder/module.txt`."""
    request = json.loads((folder / "request.json").read_text())
    resource.setrlimit(resource.RLIMIT_DATA, (request["memory_limit"], request["memory_limit"]))
    started = time.perf_counter()
    lowered = lower(request)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    finished = time.perf_counter()
    (folder / "module.txt").write_text(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError(f"the compiler for {request['target']} gives no memory analysis")
    result = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "lower_seconds": round(lowered_at - started, 3),
        "compile_seconds": round(finished - lowered_at, 3),
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
