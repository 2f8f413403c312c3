"""The `devices` marker: a test sees as many CPU devices as it asks for, whatever ran before it in the same process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec


def total() -> float:
    """A jitted sum over as many shards as there are devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    x = jax.device_put(np.arange(64.0).reshape(8, 8), NamedSharding(mesh, PartitionSpec("data")))
    assert len(x.addressable_shards) == jax.device_count()
    return float(jax.jit(jnp.sum)(x))


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize(
    "count", [1, pytest.param(8, marks=pytest.mark.devices(8)), pytest.param(2, marks=pytest.mark.devices(2))]
)
def test_each_test_sees_its_devices(count: int, turn: int) -> None:
    """One, eight and two devices in turn; the sum of 0..63 is 2016 on any of them."""
    assert jax.device_count() == count
    assert total() == 2016.0
