"""Quantised tensors: what they stand for, what they cost, and the product with them."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from llmjax.quant.double import DoubleScales, double_quantise, dynamic_map
from llmjax.quant.float8 import Float8
from llmjax.quant.fp4 import FP4
from llmjax.quant.hadamard import rotate
from llmjax.quant.integers import Integer
from llmjax.quant.method import RTN
from llmjax.quant.nf4 import NF4
from llmjax.quant.quantize import matrices
from llmjax.quant.report import nbytes
from llmjax.quant.rotation import Rotated
from llmjax.quant.tensor import Layout
from pallas_kernels import chips
from tests.evidence import evidence

QUERY = Layout(inputs=(12,), outputs=(2, 8))
OUT = Layout(inputs=(2, 8), outputs=(12,))
EXPERTS = Layout(inputs=(8,), outputs=(6,), batch=(3,))
FORMATS = [
    NF4(block=8, double=True),
    FP4(block=64),
    Float8(block="channel"),
    Integer(bits=3, block="tensor"),
    Integer(bits=5, block=4, zero_point="integer", double=True),
    Integer(block=10, zero_point="real"),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def blockwise(w, form, layout):
    """What a parameter stands for after rounding, by hand: torch's order, cut into blocks, one by one."""
    flat = w.reshape(layout.rows, layout.columns).T.reshape(-1)
    size = form.size(layout.rows, layout.columns)
    blocks = [jnp.asarray(flat[i : i + size]) for i in range(0, flat.size, size)]
    fit, code = jax.jit(form.fit), jax.jit(form.round)
    fits = [fit(block) for block in blocks]
    scales = [scale for scale, _ in fits]
    if form.double:
        scales = list(double_quantise(jnp.asarray(scales)[None]).values()[0])
    # Codes are those of the scales before they are rounded themselves.
    values = [
        form.decode(code(block, *own), scale, own[1]) for block, own, scale in zip(blocks, fits, scales, strict=True)
    ]
    return np.concatenate(values).reshape(layout.columns, layout.rows).T.reshape(layout.shape)


@evidence("H03", oracle="blocks cut from torch's flat order, one by one", code="llmjax.quant.tensor")
@pytest.mark.parametrize(("form", "layout"), list(zip(FORMATS, [QUERY, OUT] * 3, strict=True)), ids=str)
def test_dense_is_what_its_blocks_say(evidence, form, layout):
    """Fused, a product and a sum may be rounded once instead of twice."""
    w = normal(*layout.shape)
    tensor = matrices(w, None, form, RTN(), layout)
    assert (tensor.shape, tensor.dtype) == (w.shape, jnp.float32)
    evidence.record(np.abs(jax.jit(lambda t: t.dense())(tensor) - blockwise(w, form, layout)).max(), 1e-6)


@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
def test_stacks_and_experts_are_matrices_each_by_itself(form):
    """Sliced by a scan, or by hand, a stack is its layers; experts are told apart too."""
    w = normal(2, *EXPERTS.shape)
    stack = matrices(w, None, form, RTN(), EXPERTS)
    assert stack.shape == w.shape
    _, dense = jax.jit(lambda t: jax.lax.scan(lambda carry, layer: (carry, layer.dense()), 0, t))(stack)
    one = Layout(EXPERTS.inputs, EXPERTS.outputs)
    for i, j in np.ndindex(2, 3):
        alone = matrices(w[i, j], None, form, RTN(), one)
        np.testing.assert_allclose(dense[i, j], alone.dense(), atol=1e-6)
    assert jax.tree.map(lambda leaf: leaf[1], stack).shape == EXPERTS.shape


PRODUCTS = {
    "nf4": (RTN(), NF4(double=True)),
    "rotated": (Rotated(), NF4(double=True)),
    "int8": (RTN(), Integer(bits=8, block="channel")),
    "int4_zeros": (RTN(), Integer(block=16, zero_point="integer")),
    "across_outputs": (RTN(), FP4(block=96)),
    "float8": (RTN(), Float8(block="channel")),
}


@evidence("H03", oracle="gradients of the dense product by jax", code="llmjax.quant.matmul")
@pytest.mark.parametrize("product", PRODUCTS)
def test_dot_and_its_gradient(evidence, product):
    """The same sums in another order; what the backward pass keeps is no dense matrix."""
    layout, (method, form) = Layout(inputs=(2, 32), outputs=(3, 16)), PRODUCTS[product]
    tensor, x = matrices(normal(*layout.shape), None, form, method, layout), normal(5, 7, 2, 32, seed=1)
    weights = normal(5, 7, 3, 16, seed=2)

    def loss(x, tensor):
        return jnp.sum(tensor.dot(x, 2) * weights)

    def dense(x):
        return jnp.sum(jnp.tensordot(x, tensor.dense(), axes=2) * weights)

    got, want = jax.jit(jax.grad(loss))(x, tensor), jax.jit(jax.grad(dense))(x)
    evidence.record(np.abs(got - want).max() / np.abs(want).max(), 2e-6)
    y = jax.jit(lambda x, t: t.dot(x, 2))(x, tensor)
    np.testing.assert_allclose(y, np.tensordot(x, tensor.dense(), axes=2), atol=2e-5)
    kept = jax.eval_shape(lambda x, t: jax.vjp(lambda x: t.dot(x, 2), x)[1], x, tensor)
    assert not [leaf for leaf in jax.tree.leaves(kept) if leaf.shape in ((64, 48), (48, 64)) and leaf.dtype != np.uint8]
    zero = jax.jit(jax.grad(loss, argnums=1, allow_int=True))(x, tensor)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero) if leaf.dtype == jnp.float32)


def test_products_on_tpu_are_the_kernel_s():
    """Of formats and rows that it knows; on several devices, and of blocks across outputs, they are XLA's."""
    layout, x = Layout((256,), (128,)), jnp.zeros((2, 256))
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def kernels(form):
        tensor = matrices(jnp.zeros(layout.shape), None, form, RTN(), layout)
        grad = jax.grad(lambda x: jnp.sum(tensor.dot(x, 1) ** 2))
        return str(jax.make_jaxpr(grad)(x)).count("name=dequantising_matmul")

    with mock.patch.object(chips, "target", return_value=("tpu", "TPU v5 lite")):
        assert [kernels(form) for form in (NF4(double=True), Integer(bits=8, block="channel"))] == [2, 2]
        assert [kernels(form) for form in (FP4(block=96), Float8(), Integer(bits=3))] == [0, 0, 0]
        with jax.sharding.use_abstract_mesh(mesh):
            assert kernels(NF4()) == 0


def test_the_dtype_that_is_handed_out():
    tensor = matrices(normal(*QUERY.shape), None, NF4(block=12), RTN(), QUERY).astype(jnp.bfloat16)
    assert tensor.dense().dtype == jnp.bfloat16
    assert tensor.dot(jnp.ones((2, 12), jnp.bfloat16), 1).dtype == jnp.bfloat16
    assert tensor.scales.dtype == jnp.float32
    with pytest.raises(ValueError, match="do not fit"):
        tensor.dot(jnp.ones((2, 11)), 1)


@evidence("H07", oracle="closed form: 4 + 8/64 + 32/(64 256) bits and one mean a matrix", code="llmjax.quant.double")
def test_bits_of_double_quantisation(evidence):
    w = normal(512, 512)
    layout = Layout((512,), (512,))
    single, double = (matrices(w, None, NF4(double=two), RTN(), layout) for two in (False, True))
    assert 8 * nbytes(single) / w.size == 4.5
    evidence.record(abs(8 * nbytes(double) / w.size - (4 + 8 / 64 + 32 / (64 * 256) + 32 / 512**2)), 0)
    assert round(8 * nbytes(double) / w.size, 3) == 4.127
    once, twice = (float(np.mean(np.square(tensor.dense() - w))) for tensor in (single, double))
    evidence.record(abs(twice / once - 1), 1e-3)


def test_double_quantisation_is_the_nearest_of_the_map():
    scales = np.abs(normal(3, 100, 6)) + 1
    found = double_quantise(jnp.asarray(scales))
    assert isinstance(found, DoubleScales)
    assert found.absmax.shape == (3, 3)
    flat = (scales.reshape(3, -1) - scales.reshape(3, -1).mean(1, keepdims=True))[1, 256:512]
    grid = dynamic_map() * np.abs(flat).max()
    want = grid[np.abs(flat[:, None] - grid).argmin(1)] + scales[1].mean()
    np.testing.assert_allclose(np.asarray(found.values()[1]).reshape(-1)[256:512], want, rtol=1e-6)


def test_hadamard_is_that_of_scipy():
    x = normal(3, 24)
    want = x.reshape(3, 3, 8) @ scipy.linalg.hadamard(8) / np.sqrt(8)
    np.testing.assert_allclose(jax.jit(rotate)(x), want.reshape(3, 24), atol=1e-6)
    np.testing.assert_allclose(rotate(rotate(jnp.asarray(x))), x, atol=1e-6)


@evidence("H03", oracle="law: shards of a quantised matrix are the quantised shards", code="llmjax.quant.tensor")
@pytest.mark.devices(8)
def test_shards_hold_whole_blocks(evidence):
    """Two by two shards of outputs and inputs, and a stack on an axis of its own; the product is that of one device."""
    layout, form = Layout((32,), (4, 3)), Integer(bits=4, block=8, zero_point="real")
    w = normal(2, *layout.shape)
    tensor = matrices(w, None, form, RTN(), layout)
    mesh = jax.make_mesh((2, 2, 2), ("stack", "in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    split = jax.device_put(tensor, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("stack", "out", "in")))
    for i, j, k in np.ndindex(2, 2, 2):
        piece = w[i, 16 * j : 16 * (j + 1), 2 * k : 2 * (k + 1)]
        alone = matrices(piece, None, form, RTN(), Layout((16,), (2, 3)))
        for leaf, other in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
            shard = next(s for s in leaf.addressable_shards if s.device == mesh.devices[i, j, k])
            evidence.record(np.abs(np.asarray(shard.data[0], np.float32) - np.asarray(other, np.float32)).max(), 0)
    x = normal(3, 32, seed=1)
    one, many = (jax.jit(lambda x, t: jax.tree.map(lambda a: a[1], t).dot(x, 1))(x, t) for t in (tensor, split))
    np.testing.assert_allclose(many, one, atol=1e-5)
