"""Torch's own fake quantisation and casts beside ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmjax.quant.fake import clipped, learned_step
from llmjax.quant.float8 import Float8
from llmjax.quant.integers import Integer
from tests.evidence import evidence

pytestmark = pytest.mark.parity


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@evidence("H01", oracle="torch.fake_quantize_per_tensor_affine and per_channel_affine", code="llmjax.quant.integers")
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("block", ["tensor", "channel"])
def test_affine_codes(evidence, bits, block):
    """Steps and zero points are ours, as torch computes none without an observer: values then agree to one rounding."""
    w = normal(32, 48) + 0.3
    form = Integer(bits=bits, zero_point="integer", block=block)
    blocks = w.reshape(1, -1) if block == "tensor" else w
    steps, zeros = form.fit(jnp.asarray(blocks))
    got = np.asarray(form.decode(form.round(blocks, steps[:, None], zeros[:, None]), steps[:, None], zeros[:, None]))
    top = 2**bits - 1
    step, zero = (torch.from_numpy(np.array(array)) for array in (steps, zeros.astype(jnp.int32)))
    if block == "tensor":
        want = torch.fake_quantize_per_tensor_affine(torch.from_numpy(w), float(step[0]), int(zero[0]), 0, top)
    else:
        want = torch.fake_quantize_per_channel_affine(torch.from_numpy(w), step, zero, 0, 0, top)
    evidence.record(np.abs(got.reshape(w.shape) - want.numpy()).max(), 1e-6)


@evidence("H14", oracle="torch.fake_quantize_per_tensor_affine and its gradient", code="llmjax.quant.fake")
def test_clipped_straight_through(evidence):
    x, upstream = normal(64, 8), normal(64, 8, seed=1)
    given = torch.from_numpy(x).requires_grad_()
    want = torch.fake_quantize_per_tensor_affine(given, 0.11, 3, 0, 15)
    want.backward(torch.from_numpy(upstream))
    value, pull = jax.vjp(jax.jit(lambda x: clipped(x, 0.11, 3.0, (0, 15))), x)
    evidence.record(np.abs(value - want.detach().numpy()).max(), 1e-6)
    evidence.record(np.abs(pull(jnp.asarray(upstream))[0] - given.grad.numpy()).max(), 1e-6)


@evidence("H14", oracle="torch._fake_quantize_learnable_per_tensor_affine and its gradients", code="llmjax.quant.fake")
def test_learned_step(evidence):
    """Sums of 512 terms. Half a step beyond the range torch still passes gradients, the paper does not: none is."""
    x, upstream = normal(64, 8), normal(64, 8, seed=1)
    v = x / np.float32(0.21)
    x[((v > 7) & (v < 7.5)) | ((v < -8) & (v > -8.5))] = 0
    given, step = torch.from_numpy(x).requires_grad_(), torch.tensor([0.21], requires_grad=True)
    factor = 1 / np.sqrt(x.size * 7)
    want = torch._fake_quantize_learnable_per_tensor_affine(given, step, torch.zeros(1), -8, 7, float(factor))
    want.backward(torch.from_numpy(upstream))
    value, pull = jax.vjp(jax.jit(learned_step), x, jnp.asarray(0.21))
    dx, ds = pull(jnp.asarray(upstream))
    evidence.record(np.abs(value - want.detach().numpy()).max(), 1e-6)
    evidence.record(np.abs(dx - given.grad.numpy()).max(), 1e-6)
    evidence.record(abs(float(ds) - float(step.grad)), 1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_float8_casts(kind, dtype):
    x = normal(1 << 12)
    got = np.asarray(jax.jit(lambda x: Float8(kind=kind).round(x, jnp.ones(()), None))(x))
    np.testing.assert_array_equal(got, torch.from_numpy(x).to(dtype).view(torch.uint8).numpy())
