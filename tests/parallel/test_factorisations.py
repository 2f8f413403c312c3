"""Every way to lay eight devices out over the six axes gives the loss and gradients of one device.

One decoder of attention and mixture of experts, whose layers, heads, experts and widths all divide by eight, so that
each of the 56 meshes does split what it names; then packings, rematerialisation, dispatches and mixers on three meshes.
"""

import functools
import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.delta_net import DeltaNet
from llmjax.nn.gla import GLA
from llmjax.nn.mamba import Mamba
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.rg_lru import RGLRU
from llmjax.nn.router import ExpertChoice, TopK
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import AXES, MeshConfig, batch_sharding, shardings
from llmjax.train.step import apply_of
from tests.evidence import evidence

pytestmark = pytest.mark.devices(8)
ROWS, LENGTH, VOCAB = 8, 8, 16
TOLERANCE = 1e-5
"""Of a tensor's largest magnitude: float32 sums in another order, over 8 layers."""

MOE = MoE(8, GLU(d_ff=8), TopK(2), z_loss=0.01, balance_loss=0.0)
MODEL = Decoder(vocab=VOCAB, d_model=8, layers=8, pattern=(Block(Attention(heads=8, head_dim=2), MOE),), unroll=1)


def factorisations(n, axes):
    """All tuples of `axes` factors whose product is `n`."""
    if axes == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in factorisations(n // d, axes - 1)]


MESHES = [MeshConfig(*sizes) for sizes in factorisations(8, len(AXES))]
QUICK = [MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(stage=2, context=2, tensor=2)]


def said(config):
    """The axes of a mesh that split something, as a test's name."""
    return "-".join(f"{name}{getattr(config, name)}" for name in AXES if getattr(config, name) > 1)


def chosen(configs, quick):
    """Parameters of a test: those in `quick` run always, the others in the matrix suite."""
    marks = {True: (), False: (pytest.mark.long,)}
    return [pytest.param(config, id=said(config), marks=marks[config in quick]) for config in configs]


def batch_of(packing):
    """Rows of unequal weight: whole documents, several in a row, or padded ones."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH))
    positions, segments = np.tile(np.arange(LENGTH), (ROWS, 1)), np.zeros((ROWS, LENGTH), int)
    loss_mask = np.ones((ROWS, LENGTH))
    loss_mask[0, :5] = 0
    if packing == "packed":
        ends = np.arange(ROWS) % 5 + 2
        segments = (np.arange(LENGTH) >= ends[:, None]).astype(int)
        positions = positions - segments * ends[:, None]
    if packing == "padded":
        absent = np.arange(LENGTH) >= (np.arange(ROWS) % 3 + 4)[:, None]
        positions, segments, loss_mask = (
            np.where(absent, x, y) for x, y in ((-1, positions), (-1, segments), (0, loss_mask))
        )
    arrays = dict(tokens=tokens, targets=np.roll(tokens, -1, 1), positions=positions, segment_ids=segments)
    arrays["target_bytes"] = np.ones((ROWS, LENGTH), int)
    return {name: x.astype(np.int32) for name, x in arrays.items()} | {"loss_mask": loss_mask.astype(np.float32)}


@functools.cache
def drawn(model):
    """The model's parameters on the host."""
    return jax.device_get(model.init(jax.random.key(0)))


def program(model, config, packing="packed"):
    """Loss and gradients of one batch, compiled for the mesh of `config`, and the arguments."""
    mesh, apply, shapes = config.build(), apply_of(model.build()), model.abstract()
    with jax.set_mesh(mesh), config.in_force():
        params = jax.device_put(drawn(model), shardings(model.logical_axes(), shapes, mesh))
        batch = jax.device_put(batch_of(packing), batch_sharding(mesh))
        run = jax.jit(jax.value_and_grad(lambda p, b: NextToken().loss(apply, p, b, None)[0]))
        return run.lower(params, batch).compile(), (params, batch)


def gradients(model, config, packing="packed"):
    """The loss and the gradients on the host."""
    compiled, arguments = program(model, config, packing)
    return jax.device_get(compiled(*arguments))


@functools.cache
def single(model, packing="packed"):
    """The same on one device."""
    return gradients(model, MeshConfig(), packing)


def worst(got, expected):
    """The largest error of any tensor, each relative to its own largest magnitude."""
    return max(
        np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    )


def test_there_are_56_meshes():
    assert len(MESHES) == math.comb(3 + 5, 5) == len(set(MESHES))


@evidence("E48", oracle="one device", code="llmjax.parallel.mesh")
@pytest.mark.parametrize("config", chosen(MESHES, QUICK))
def test_every_mesh_equals_one_device(config, evidence):
    evidence.record(worst(gradients(MODEL, config), single(MODEL)), TOLERANCE)


def with_block(**changes):
    """The model with another block."""
    return replace(MODEL, pattern=(replace(MODEL.pattern[0], **changes),))


THREE = [
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=2, context=2, expert=2),
    MeshConfig(data=2, stage=2, expert=2, microbatches=2),
]
VARIANTS = {
    "whole": (MODEL, "whole"),
    # The router's loss is a mean over tokens that are there, in a pipeline one of each microbatch: here they differ.
    "padded": (with_block(mlp=replace(MOE, z_loss=0.0)), "padded"),
    "remat full": (replace(MODEL, remat="full"), "packed"),
    "remat dots": (replace(MODEL, remat="dots"), "packed"),
    "remat attention": (replace(MODEL, remat="attention"), "packed"),
    "capacity": (with_block(mlp=replace(MOE, capacity=1.0)), "packed"),
    "expert choice": (with_block(mlp=replace(MOE, router=ExpertChoice())), "packed"),
    "Mamba": (with_block(mixer=Mamba()), "packed"),
    "GLA": (with_block(mixer=GLA(heads=2)), "packed"),
    "DeltaNet": (with_block(mixer=DeltaNet(heads=2)), "packed"),
    "RGLRU": (with_block(mixer=RGLRU(blocks=2)), "packed"),
}


@evidence("E53", oracle="one device", code="llmjax.nn.dispatch")
@pytest.mark.matrix
@pytest.mark.parametrize("config", THREE, ids=said)
def test_experts_with_capacity_on_three_meshes(config, evidence):
    evidence.record(worst(gradients(*at("capacity", config)), single(*VARIANTS["capacity"])), TOLERANCE)


@evidence("E53", oracle="one device", code="llmjax.nn.dispatch")
@pytest.mark.matrix
@pytest.mark.parametrize("name", ["capacity", "whole"])
def test_a_rule_may_split_the_batch_over_experts_too(name, evidence):
    """Tokens and experts on the same mesh axis: the buffers of experts go to them and back, and no weight is moved."""
    config = MeshConfig(data=2, expert=4, rules=(("batch", "data", "fsdp", "expert"),))
    compiled, arguments = program(*at(name, config))
    evidence.record(worst(jax.device_get(compiled(*arguments)), single(*VARIANTS[name])), TOLERANCE)
    moved = re.findall(r"= (.*?) (all-to-all|all-gather)\(.*op_name=\"(.*?)\"", compiled.as_text())
    assert not [op for _, kind, op in moved if kind == "all-gather" and ("edf" in op or "dynamic_index" in op)]
    if name == "capacity":
        assert len([shape for shape, kind, _ in moved if kind == "all-to-all" and f",{MODEL.d_model}]" in shape]) >= 2


@evidence("E48", oracle="one device", code="llmjax.parallel.mesh")
@pytest.mark.long
@pytest.mark.parametrize("config", THREE, ids=said)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "capacity"])
def test_every_variant_on_three_meshes(name, config, evidence):
    evidence.record(worst(gradients(*at(name, config)), single(*VARIANTS[name])), TOLERANCE)


def at(name, config):
    """Model, mesh and packing of a variant."""
    model, packing = VARIANTS[name]
    return model, config, packing
