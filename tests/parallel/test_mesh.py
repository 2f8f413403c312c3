"""The mesh table, and training on eight fake devices against one: GSPMD must not change what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.config import ConfigError, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import AXES, RULES, MeshConfig, batch_sharding, fit, per_device, shardings
from llmjax.train.step import apply_of
from tests.evidence import evidence

pytestmark = pytest.mark.devices(8)
MODEL = Decoder(vocab=32, d_model=16, layers=2, pattern=(Block(mixer=Attention(kv_heads=2)),))


def gradients(config):
    """Loss and gradients of one batch on the mesh of `config`, gathered to the host."""
    mesh = config.build()
    placed = shardings(MODEL.logical_axes(), MODEL.abstract(), mesh)
    params = jax.jit(MODEL.init, out_shardings=placed)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "loss_mask": jnp.ones((8, 12)).at[0, :7].set(0),  # shards of unequal weight
        "positions": jnp.broadcast_to(jnp.arange(12), (8, 12)),
        "segment_ids": jnp.ones((8, 12), jnp.int32),
        "target_bytes": jnp.ones((8, 12), jnp.int32),
    }
    batch = jax.device_put(batch, batch_sharding(mesh))

    def loss(p, b):
        return NextToken().loss(apply_of(MODEL.build()), p, b, None)[0]

    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch)), params


@pytest.fixture(scope="module")
def single():
    return gradients(MeshConfig())[0]


@evidence("E48", oracle="one device", code="llmjax.parallel.mesh")
@evidence("E49", oracle="one device", code="llmjax.parallel.mesh")
@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=8), MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)],
    ids=["data", "fsdp", "both", "tensor"],
)
def test_loss_and_gradients_equal_one_device(config, single, evidence):
    got, _ = gradients(config)
    errors = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), got, single)
    evidence.record(max(map(float, jax.tree.leaves(errors))), 2e-6)


@evidence("E50", oracle="one device", code="llmjax.parallel.mesh")
def test_tensor_axis_equals_one_device(single, evidence):
    got, params = gradients(MeshConfig(data=2, fsdp=2, tensor=2))
    errors = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), got, single)
    evidence.record(max(map(float, jax.tree.leaves(errors))), 2e-6)
    assert params["blocks"]["0"]["mixer"]["query"]["kernel"].sharding.spec == P(None, "fsdp", "tensor", None)


def test_fsdp_splits_every_matrix():
    mesh = MeshConfig(fsdp=8).build()
    for sharding, leaf in zip(
        jax.tree.leaves(shardings(MODEL.logical_axes(), MODEL.abstract(), mesh)),
        jax.tree.leaves(MODEL.abstract()),
        strict=True,
    ):
        held = np.prod(sharding.shard_shape(leaf.shape))
        assert held * (8 if leaf.ndim > 2 else 1) <= leaf.size


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = MeshConfig(fsdp=4, tensor=2).build()
    assert fit(P("fsdp", "tensor"), (6, 6), mesh) == P(None, "tensor")
    assert fit(P(("data", "fsdp"), None), (8, 3), mesh) == P(("data", "fsdp"), None)


def test_every_parameter_axis_is_in_the_table():
    known = {name for name, _ in RULES}
    for spec in jax.tree.leaves(MODEL.logical_axes(), is_leaf=lambda x: isinstance(x, P)):
        assert set(spec) <= known
    assert {a for _, axes in RULES for a in (axes if isinstance(axes, tuple) else (axes,)) if a} <= set(AXES)


def test_zero_data_takes_the_devices_left():
    assert MeshConfig(data=0, fsdp=2).build().shape["data"] == 4


def test_too_few_devices_and_bad_sizes_are_named():
    with pytest.raises(ValueError, match="mesh fsdp=16 needs 16 devices, there are 8"):
        MeshConfig(fsdp=16).build()
    with pytest.raises(ConfigError, match="tensor=0 must be at least 1"):
        validate(MeshConfig(tensor=0))


@pytest.mark.parametrize(("tensor", "local"), [(2, (2, 12, 2, 4)), (4, (4, 12, 4, 4))], ids=["even", "uneven"])
def test_kernels_see_one_device_s_part(tensor, local):
    """Rows are split, and heads where the kv heads come out even: four query heads share two."""
    mesh = MeshConfig(data=8 // tensor, tensor=tensor).build()
    q, kv = jnp.ones((8, 12, 4, 4)), jnp.ones((8, 12, 2, 4))
    seen = []

    def kernel(q, kv, ids):
        assert ids is None
        seen.append(q.shape)
        return q * kv.sum()

    names = ("batch", None, "kv_heads", None)
    run = jax.jit(lambda q, kv: per_device(kernel, (names, names, ("batch", None)), names, q, kv, None))
    with jax.set_mesh(mesh):
        out = run(q, kv)
    assert seen == [local]
    assert out.shape == q.shape
    assert run(q, kv).shape == q.shape
    assert seen[1:] == [q.shape]  # without a mesh there is nothing to split
