"""Devices that are not there, for compiling with the real TPU and GPU compilers on a machine that has neither."""

import jax

from llmjax.config import InputError
from pallas_kernels import chips


def absent_devices(name: str) -> list[jax.Device]:
    """Devices of `chip:topology`, such as "v5e:4x4" or "h200:1x1x8" (hosts x ... x GPUs a host).

    What must be installed and set is said in `pallas_kernels.chips`.
    Raises InputError where the name has another form or no compiler for it is installed.
    """
    try:
        return chips.absent_devices(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"no compiler for topology={name!r}: install llmjax[cuda] or llmjax[tpu] ({reason})"
        ) from error
