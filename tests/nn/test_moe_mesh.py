"""Mixture of experts on eight fake devices against one: splitting experts and widths must not change the results."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import PartitionSpec as P

from llmjax.nn.auxiliary import over_layers
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mixer import Context
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.router import TopK
from llmjax.parallel.mesh import MeshConfig, batch_sharding, shardings
from tests.evidence import evidence

pytestmark = [pytest.mark.devices(8), pytest.mark.mixers]
LAYER = MoE(4, GLU(d_ff=8, bias=True), TopK(2), shared=1, z_loss=0.1, bias_rate=0.1)
TOLERANCE = 2e-6
"""Relative to the largest value: float32 sums in another order."""


def gradients(layer, config):
    """Output, losses, metrics and gradients of one layer on the mesh of `config`, and its placed parameters."""
    mesh, module, rng = config.build(), layer.build(8, 1, GPT2Init()), np.random.default_rng(0)
    x, target = rng.normal(size=(2, 4, 10, 8)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(10), (4, 10)).at[0, 4:].set(-1)  # shards of unequal load
    x, target, positions = jax.device_put((x, target, positions), batch_sharding(mesh))
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), x, Context(positions))["params"])
    values = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(np.float32), meta.unbox(boxed))
    params = jax.device_put(values, shardings(nn.get_partition_spec(boxed), meta.unbox(boxed), mesh))

    def loss(params, x, positions):
        y, handed_out = module.apply({"params": params}, x, Context(positions), mutable=["losses", "metrics"])
        losses = over_layers(jnp.sum, handed_out["losses"])
        return jnp.sum(target * y) + sum(losses.values()), (y, handed_out)

    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        return jax.device_get(run(params, x, positions)), params


CASES = {
    "dropless": (LAYER, MeshConfig(data=2, expert=2, tensor=2)),
    "capacity": (dataclasses.replace(LAYER, capacity=0.75), MeshConfig(data=2, expert=2, tensor=2)),
    "uneven experts": (dataclasses.replace(LAYER, experts=3), MeshConfig(fsdp=2, context=2, expert=2)),
}


@evidence("A35", oracle="one device", code="llmjax.nn.dispatch")
@pytest.mark.parametrize("name", list(CASES))
def test_a_mesh_equals_one_device(name, evidence):
    layer, mesh = CASES[name]
    expected, _ = gradients(layer, MeshConfig())
    got, params = gradients(layer, mesh)
    errors = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b))), got, expected)
    evidence.record(max(map(float, jax.tree.leaves(errors))), TOLERANCE)
    split = P(None, "fsdp", None) if name == "uneven experts" else P("expert", None, "tensor")
    assert params["experts"]["gate"]["kernel"].sharding.spec == split
