"""The mesh table, and training on eight fake devices against one: GSPMD must not change what is computed."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.cli.commands.show import placement, placement_text
from llmjax.config import ConfigError, validate
from llmjax.data import Data
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import GLU
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.fitting import whole
from llmjax.parallel.mesh import AXES, RULES, MeshConfig, arranged, batch_sharding, fit, per_device, shardings
from llmjax.train.config import Train
from llmjax.train.ema import Ema
from llmjax.train.optimizers import AdamW
from llmjax.train.state import plan
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
def test_loss_and_gradients_equal_one_device(single, evidence):
    got, _ = gradients(MeshConfig(data=2, fsdp=4))
    errors = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), got, single)
    evidence.record(max(map(float, jax.tree.leaves(errors))), 2e-6)


@pytest.mark.matrix
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


def test_a_rule_of_the_experiment_replaces_a_line_of_the_table():
    config = MeshConfig(fsdp=2, tensor=2, rules=(("heads",), ("d_model", "fsdp", "tensor")))
    kernel = lambda: shardings(MODEL.logical_axes(), MODEL.abstract(), config.build())["blocks"]["0"]["mixer"]["query"]
    with config.in_force():
        assert kernel()["kernel"].spec == P(None, ("fsdp", "tensor"), None, None)
    assert kernel()["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert [name for name, _ in config.table] == [name for name, _ in RULES]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (("hed", "tensor"), "names hed, which is no logical axis"),
        (("heads", "tensr"), "names tensr, which is no mesh axis: did you mean tensor?"),
        (("heads", "tensor", "tensor"), "names a mesh axis twice for heads"),
    ],
)
def test_a_rule_that_names_nothing_is_named(line, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        validate(MeshConfig(rules=(line,)))


def test_only_data_crosses_the_slow_network():
    """Two slices of six devices, listed in turn: rows of the mesh are of one slice each; the fifth and sixth rest."""
    devices = [SimpleNamespace(id=i, slice_index=i % 2, process_index=0) for i in range(12)]
    mesh = arranged(devices, (4, 2, 1, 1, 1, 1), 2)
    assert [[d.slice_index for d in row.flat] for row in mesh] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert [d.id for d in mesh.flat] == [0, 2, 4, 6, 1, 3, 5, 7]
    hosts = [SimpleNamespace(id=i, slice_index=None, process_index=i // 4) for i in range(8)]
    assert [d.process_index for d in arranged(hosts, (2, 1, 1, 1, 1, 4), 2).flat] == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="mesh.slices=3 of 4 devices each: there are 2 slices as large as that"):
        arranged(devices, (3, 4, 1, 1, 1, 1), 3)
    with pytest.raises(ConfigError, match="slices=2 does not divide data=3"):
        validate(MeshConfig(data=3, slices=2))


def test_an_axis_left_whole_says_which_array_and_what_would_fit():
    """Two kv heads on four devices, and one layer's worth of nothing else: width, heads and vocabulary divide."""
    mesh = MeshConfig(fsdp=2, tensor=4).build()
    found = whole(MODEL.logical_axes(), MODEL.abstract(), mesh)
    assert {(w.path, w.axis) for w in found} == {(f"blocks/0/mixer/{part}/kernel", 2) for part in ("key", "value")}
    assert found[0].why == "kv_heads=2 stays whole on tensor=4: a multiple of 4 would be split"
    assert whole(MODEL.logical_axes(), MODEL.abstract(), MeshConfig(fsdp=4, tensor=2).build()) == []


@pytest.mark.parametrize(
    ("mesh", "why"),
    [
        (
            MeshConfig(tensor=3),
            r"mesh.tensor=3 splits no parameter \(d_ff=32, heads=4, kv_heads=2, vocab=1024\): use 1 or 2",
        ),
        (MeshConfig(expert=2), r"mesh.expert=2 splits no parameter \(none has such an axis\): use 1"),
        (MeshConfig(context=5), r"data.length=256 does not split over mesh.context: use a multiple of 5"),
        (MeshConfig(data=5), r"data.batch_size=6 does not split over train.accumulate x mesh.data x .*multiple of 5"),
    ],
    ids=lambda x: "" if isinstance(x, str) else None,
)
def test_a_mesh_that_splits_nothing_is_a_config_error(mesh, why):
    block = Block(mixer=Attention(heads=4, kv_heads=2), mlp=GLU(d_ff=32))
    model = dataclasses.replace(MODEL, vocab=1024, pattern=(block,))
    with pytest.raises(ConfigError, match=why):
        validate(Experiment(model=model, data=Data(batch_size=6), mesh=mesh))


WIDE = Decoder(vocab=256, d_model=128, layers=2, pattern=(Block(mixer=Attention(heads=8, head_dim=16)),))


@evidence("E48", oracle="XLA's own count of bytes", code="llmjax.train.state")
def test_parameters_are_never_whole_on_one_device(evidence):
    """Each device makes and returns an eighth of the state, and the few vectors that are whole."""
    layout = plan(WIDE, AdamW(), Train(ema=Ema()), MeshConfig(fsdp=8).build())
    memory = jax.jit(layout.init, static_argnums=0).lower(0).compile().memory_analysis()
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layout.abstract))
    evidence.record(memory.output_size_in_bytes / total, 1.02 / 8)
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(layout.abstract))
    assert memory.temp_size_in_bytes < largest


def test_show_knows_the_bytes_of_each_device():
    """Against the shards of arrays that are there; and for a mesh whose devices are not."""
    experiment = Experiment(model=WIDE, train=Train(ema=Ema()), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    found = placement(experiment)
    state = plan(WIDE, experiment.optimizer, experiment.train, experiment.mesh.build()).init(0)
    for name, tree in {"parameters": state.params, "optimizer_state": state.opt_state, "ema": state.ema}.items():
        local = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)]
        assert found["bytes_per_device"][name] == sum(local)
    assert found["split"]["blocks/0/mixer/query/kernel"] == ["", "fsdp", "tensor", ""]
    pod = placement(dataclasses.replace(experiment, mesh=MeshConfig(fsdp=16, stage=2, tensor=16, microbatches=7)))
    assert pod["devices"] == 512
    text = placement_text(pod)
    assert "on each of 512 devices (fsdp=16 x stage=2 x tensor=16)" in text
    assert "heads=8 stays whole on tensor=16: a multiple of 16 would be split" in text
    assert "bubble: each stage is idle for 12.5% of a pass through the layers" in text


@evidence("E50", oracle="Shoeybi et al. 2019: one reduction after each half of a block", code="llmjax.parallel.mesh")
def test_a_block_of_a_tensor_parallel_forward_pass_has_two_reductions(evidence):
    """Counted in the compiled program: both in the body of the loop over layers, and none outside of it."""
    mesh = MeshConfig(tensor=8).build()
    model = dataclasses.replace(WIDE, unroll=1)
    places = shardings(model.logical_axes(), model.abstract(), mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.abstract(), places)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda p, t: model.build().apply({"params": p}, t, method="features")[0].hidden)
        text = run.lower(params, tokens).compile().as_text()
    parts = dict(re.findall(r"^%?(\S+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    sent = {
        name: re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", code) for name, code in parts.items()
    }
    (body,) = re.findall(r"body=%([\w.-]+)", text)
    assert sent.pop(body) == ["all-reduce"] * 2
    evidence.record(sum(map(len, sent.values())), 0)
