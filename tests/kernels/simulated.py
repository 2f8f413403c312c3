"""A TPU that is not there, for the tests of kernels."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels._compat import tpu_simulation


@contextlib.contextmanager
def simulated_tpu() -> Iterator[None]:
    """Programs are for a TPU, whose kernels run on the CPU with memories, copies and races simulated."""
    with (
        mock.patch.object(chips, "target", return_value=("tpu", "TPU v5 lite")),
        pltpu.force_tpu_interpret_mode(tpu_simulation(detect_races=True)),
    ):
        yield
    races = interpret_pallas_call.races
    assert races is None or not races.races_found
