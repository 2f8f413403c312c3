"""Training with the sequence split over devices: the same loss and gradients, and nothing of full length on a device.

What a mesh with `context` is for is read from the compiled program: permutes in loops, no array as long as the
sequence, and memory that stays as it is when tokens and devices grow together.
"""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.delta_net import DeltaNet
from llmjax.nn.gla import GLA
from llmjax.nn.mamba import Mamba
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.mask_longnet import LongNet
from llmjax.nn.masks import Window
from llmjax.nn.mla import MLA
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.rg_lru import RGLRU
from llmjax.nn.rwkv7 import RWKV7
from llmjax.nn.s5 import S5
from llmjax.nn.t5_bias import T5Bias
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.layout import from_zigzag, to_zigzag
from llmjax.parallel.mesh import AXES, MeshConfig, batch_sharding, shardings
from llmjax.train.step import apply_of
from pallas_kernels import chips, to_layout
from pallas_kernels.ring_attention import either
from tests.evidence import evidence

pytestmark = pytest.mark.devices(8)
ROWS, LENGTH, VOCAB = 4, 32, 16
TOLERANCE = 1e-5
"""Of a tensor's largest magnitude: float32 sums in another order."""


def decoder(*mixers):
    blocks = tuple(Block(mixer, GLU(d_ff=16)) for mixer in mixers)
    return Decoder(vocab=VOCAB, d_model=8, layers=2 * len(mixers), pattern=blocks, unroll=1)


def batch_of(packing, rows=ROWS, length=LENGTH):
    """Rows of unequal weight: whole documents, or several in a row with padding between and behind them."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (rows, length))
    positions, segments = np.tile(np.arange(length), (rows, 1)), np.zeros((rows, length), int)
    loss_mask = np.ones((rows, length))
    loss_mask[0, : length // 2] = 0
    if packing == "packed":
        for row in range(rows):
            ends = [3 + row, length // 2 + row, length - 5]
            segments[row] = np.searchsorted(ends, np.arange(length), side="right")
            positions[row] -= np.array([0, *ends])[segments[row]]
            absent = (np.arange(length) >= length - row) | (segments[row] == 1) & (
                np.arange(length) < length // 3 + row
            )
            positions[row, absent], segments[row, absent], loss_mask[row, absent] = -1, -1, 0
    arrays = dict(tokens=tokens, targets=np.roll(tokens, -1, 1), positions=positions, segment_ids=segments)
    arrays["target_bytes"] = np.ones((rows, length), int)
    return {name: x.astype(np.int32) for name, x in arrays.items()} | {"loss_mask": loss_mask.astype(np.float32)}


@functools.cache
def drawn(model):
    """The model's parameters on the host, none of them zero: sinks and biases too."""
    params = jax.device_get(model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), params)


def program(model, config, batch):
    """Loss and gradients, compiled for the mesh of `config`, and the arguments."""
    mesh, apply = config.build(), apply_of(model.build())
    with jax.set_mesh(mesh), config.in_force():
        params = jax.device_put(drawn(model), shardings(model.logical_axes(), model.abstract(), mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
        run = jax.jit(jax.value_and_grad(lambda p, b: NextToken(chunk=None).loss(apply, p, b, None)[0]))
        return run.lower(params, batch).compile(), (params, batch)


def gradients(model, config, packing):
    """The loss and the gradients on the host."""
    compiled, arguments = program(model, config, batch_of(packing))
    return jax.device_get(compiled(*arguments))


@functools.cache
def single(model, packing):
    """The same on one device."""
    return gradients(model, MeshConfig(), packing)


def worst(got, expected):
    """The largest error of any tensor, each relative to its own largest magnitude."""
    return max(
        np.max(np.abs(a - b)) / np.max(np.abs(b))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    )


def said(x):
    """A mesh as a test's name: the axes that split something."""
    if isinstance(x, MeshConfig):
        return "-".join(f"{name}{getattr(x, name)}" for name in AXES if getattr(x, name) > 1)
    return None


# ---- one device ------------------------------------------------------------------------------------------------------

GROUPED, BAND = Attention(heads=4, kv_heads=2, sinks=True), Attention(heads=4, mask=Window(6), soft_cap=3.0)
LATENT = MLA(heads=2, kv_rank=4, q_rank=None, nope_dim=4, rope_dim=2, value_dim=6, form="expanded")
MODELS = {
    "causal": (decoder(Attention(heads=4)), "whole"),
    "packed": (decoder(GROUPED), "packed"),
    "window": (decoder(BAND), "packed"),
    "latent": (decoder(LATENT), "packed"),
    "hybrid": (decoder(Mamba(d_state=4), GROUPED), "packed"),
}
MESHES = [MeshConfig(context=8), MeshConfig(context=4, tensor=2), MeshConfig(context=2, data=2, fsdp=2)]
QUICK = [("packed", MESHES[1])]


def suite(i, j):
    """Every model on one mesh and every mesh with some model in the matrix suite, the rest in the long one."""
    return pytest.mark.matrix if (i + j) % len(MESHES) == 0 else pytest.mark.long


@evidence("E52", oracle="one device", code="llmjax.nn.scores")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else suite(i, j), id=f"{name}-{said(mesh)}")
        for i, name in enumerate(MODELS)
        for j, mesh in enumerate(MESHES)
    ],
)
def test_loss_and_gradients_equal_one_device(name, config, evidence):
    model, packing = MODELS[name]
    evidence.record(worst(gradients(model, config, packing), single(model, packing)), TOLERANCE)


RECURRENT = {
    "Mamba2": Mamba2(d_state=4, head_dim=4),
    "GLA": GLA(heads=2),
    "DeltaNet": DeltaNet(heads=2),
    "RWKV7": RWKV7(heads=2, decay_rank=2, rate_rank=2, gate_rank=2),
    "RGLRU": RGLRU(blocks=2),
    "S5": S5(d_state=4, blocks=1),
}


@evidence("E52", oracle="one device", code="llmjax.nn.scans")
@pytest.mark.matrix
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrences_equal_one_device(name, evidence):
    """Documents that begin, end and cross parts of four tokens, parts in which no token is there."""
    model = decoder(RECURRENT[name])
    evidence.record(worst(gradients(model, MESHES[0], "packed"), single(model, "packed")), TOLERANCE)


OTHERS = {
    "bias that no ring takes": replace(decoder(Attention(heads=4, rope=None)), distance=T5Bias()),
    "kernel that is no ring": decoder(Attention(heads=4, implementation="reference")),
    "experts": replace(decoder(), layers=2, pattern=(Block(GROUPED, MoE(4, GLU(d_ff=8))),)),
    "rematerialised": replace(decoder(GROUPED), remat="full"),
    "in stages": decoder(GROUPED),
}


@evidence("E52", oracle="one device", code="llmjax.nn.stack")
@pytest.mark.matrix
@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_equals_one_device(name, evidence):
    """Tokens in zigzag order meet what is not made for rings; stages keep sequences whole."""
    config = MeshConfig(context=4, stage=2) if name == "in stages" else MESHES[1]
    evidence.record(worst(gradients(OTHERS[name], config, "packed"), single(OTHERS[name], "packed")), TOLERANCE)


@evidence("E52", oracle="one device", code="pallas_kernels.ring_attention.either")
@pytest.mark.matrix
def test_an_exchange_of_heads_equals_one_device(monkeypatch, evidence):
    """Where the chooser says so: no ring then; two key heads serve four devices."""
    monkeypatch.setattr(either, "exchanges_heads", lambda *_: True)
    compiled, arguments = program(MODELS["packed"][0], MeshConfig(context=4, data=2), batch_of("packed"))
    evidence.record(worst(jax.device_get(compiled(*arguments)), single(*MODELS["packed"])), TOLERANCE)
    assert "all-to-all" in compiled.as_text()
    assert not rings(compiled.as_text())


# ---- the compiled program --------------------------------------------------------------------------------------------


def bodies(text):
    """The instructions of every loop's body, by name."""
    parts = dict(re.findall(r"^%?(\S+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    return {name: parts[name] for name in re.findall(r"body=%([\w.-]+)", text)}


def rings(text):
    """Loops that send something on in every round."""
    return [name for name, code in bodies(text).items() if " collective-permute(" in code and "while(" not in code]


@pytest.mark.matrix
@evidence("C07", oracle="one device", code="llmjax.nn.mask_longnet")
def test_dilated_segments_of_a_split_sequence(evidence):
    """Segments as long as a device's part, twice and four times that, each with every n-th of its keys."""
    model = decoder(Attention(heads=4, mask=LongNet(segments=(8, 16, 32), dilations=(1, 2, 4))))
    got = gradients(model, MeshConfig(context=4, tensor=2), "whole")
    evidence.record(worst(got, single(model, "whole")), TOLERANCE)


@evidence("E52", oracle="the compiled program", code="llmjax.nn.scores")
@pytest.mark.parametrize("name", ["packed", pytest.param("hybrid", marks=pytest.mark.matrix)])
def test_no_device_holds_anything_of_full_length(name, evidence):
    """Keys travel in one loop forward and one backward; no array has the length of the sequence, gathered or not."""
    text = program(MODELS[name][0], MeshConfig(context=4), batch_of("packed", 3, 88))[0].as_text()
    assert len(rings(text)) == 2
    shapes = set(re.findall(r"[a-z]\w*\[([\d,]+)\]", text))
    assert any("22" in shape.split(",") for shape in shapes)
    evidence.record(sum("88" in shape.split(",") for shape in shapes) + text.count(" all-gather("), 0)


@evidence("E52", oracle="XLA's memory analysis", code="llmjax.nn.scores")
@pytest.mark.matrix
@pytest.mark.parametrize("name", ["packed", "hybrid"])
def test_memory_of_a_device_is_flat(name, evidence):
    """Four times the tokens on four times the devices."""

    def temporary(shards):
        batch = batch_of("packed", length=64 * shards)
        return program(MODELS[name][0], MeshConfig(context=shards), batch)[0].memory_analysis().temp_size_in_bytes

    evidence.record(temporary(8) / temporary(2), 1.1)


# ---- layout and choice -----------------------------------------------------------------------------------------------


@evidence("C05", oracle="the layout written out", code="llmjax.parallel.layout")
@pytest.mark.parametrize("shards", [2, 8])
def test_halves_are_sent_to_their_places_and_back(shards, evidence):
    x = {"tokens": np.arange(3 * 32).reshape(3, 32), "none": None}
    mesh = MeshConfig(context=shards).build()
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, batch_sharding(mesh))
        there = jax.jit(to_zigzag)(placed)
        back = jax.jit(from_zigzag)(there)
    wrong = np.sum(there["tokens"] != to_layout(x["tokens"], shards)) + np.sum(back["tokens"] != x["tokens"])
    evidence.record(int(wrong), 0)


def test_models_choose_their_layout():
    """Zigzag where causal attention to everything is all that mixes tokens."""
    assert decoder(GROUPED, BAND).uneven(1024)
    assert decoder(LATENT).uneven(1024)
    assert not decoder(BAND).uneven(1024)  # each token has as much to do, and contiguous parts have few hops
    assert not decoder(GROUPED, Mamba()).uneven(1024)
    assert not replace(decoder(GROUPED), pattern=(Block(GROUPED, dropout=0.1),)).uneven(1024)
    assert not replace(decoder(GROUPED), pattern=(Block(GROUPED, MoE(capacity=1.0)),)).uneven(1024)


@pytest.mark.parametrize(
    ("target", "heads", "length", "exchanged"),
    [
        (("cpu", "cpu"), 32, 2**17, False),
        (("gpu", "NVIDIA H200"), 32, 2**17, True),
        (("gpu", "NVIDIA H200"), 6, 2**17, False),
        (("tpu", "TPU v5"), 32, 2**20, False),
        (("tpu", "TPU v5"), 64, 512, True),
    ],
)
def test_chips_choose_between_ring_and_exchange(target, heads, length, exchanged, monkeypatch):
    """On TPUs as in `choose`; on GPUs, which have no kernel for a ring, wherever heads divide."""
    monkeypatch.setattr(chips, "target", lambda: target)
    x = jax.ShapeDtypeStruct((1, length // 8, heads, 128), jnp.bfloat16)
    assert either.exchanges_heads(x, x, x, 8, True, None) == exchanged
