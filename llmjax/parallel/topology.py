"""Devices that are not there, for compiling with the real TPU and GPU compilers on a machine that has neither.

TPU needs `libtpu`, and TPU_SKIP_MDS_QUERY=1, TPU_WORKER_HOSTNAMES=localhost in the environment; GPU needs the CUDA
plugin and PJRT packages of the same jax. JAX_PLATFORMS=cpu keeps both from being started.
"""

from importlib import resources

import jax
from jax.experimental import topologies

from llmjax.config import InputError

GPUS = ("h200",)
"""Chips whose description stands in `chips/`; the other names are those of the TPU compiler."""


def absent_devices(name: str) -> list[jax.Device]:
    """Devices of `chip:topology`, such as "v5e:4x4" or "h200:1x1x8" (hosts x ... x GPUs a host).

    Raises InputError where the name has another form or no compiler for it is installed.
    """
    chip, colon, shape = name.partition(":")
    if not colon or not shape.replace("x", "").isdecimal():
        raise InputError(f"topology={name!r} is not of the form chip:AxBxC, such as v5e:4x4 or h200:1x1x8")
    try:
        if chip in GPUS:
            target = resources.files("llmjax.parallel").joinpath(f"chips/{chip}.txtpb").read_text()
            found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"no compiler for topology={name!r}: install llmjax[cuda] or llmjax[tpu] ({reason})"
        ) from error
    return list(found.devices)
