"""Attention over its whole grid of features against numpy in float64: output, log-sum-exp, and every gradient.

Gradients are checked along a random direction, by central differences of the float64 oracle. Few shapes, many features:
what a case costs is compiling it.
"""

import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention, chips
from pallas_kernels.attention.tiled import Config
from tests.kernels.oracle import attend, visible

BATCH = 2
STEP = 1e-5
OUTPUT_TOLERANCE = 1e-5  # float32 sums over at most 13 keys, scores up to about 10
GRADIENT_TOLERANCE = 2e-4  # of sums over every element, whose float32 errors add up
FORMS = {"reference": ("reference", None), "xla": ("xla", None), "tiled": ("xla", Config(4, 5)), "tpu": ("tpu", None)}
PLAIN = ("reference", "xla", "tiled")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of 13 tokens in several blocks."""
    monkeypatch.setattr(importlib.import_module("pallas_kernels.attention.xla"), "UNDIVIDED", 4)


@st.composite
def cases(draw, forms=PLAIN):
    """One combination of features that the function promises to take."""
    kv_heads = draw(st.sampled_from([1, 2]))
    length = draw(st.sampled_from([13, 6, 1]))
    positioned = draw(st.booleans())
    square = draw(st.booleans())
    lengths = (length, length if square else draw(st.sampled_from([13, 6, 1])))
    windowed = (positioned or lengths[0] == lengths[1]) and draw(st.booleans())
    side = st.none() | st.integers(0, 6)
    flag = functools.partial(draw, st.booleans())
    form = draw(st.sampled_from(forms))
    biases = [None, (1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 0, 0)]
    return {
        "form": form,
        "heads": kv_heads * draw(st.sampled_from([1, 2])),
        "kv_heads": kv_heads,
        "dims": draw(st.sampled_from([(4, 4), (6, 3)])),
        "lengths": lengths,
        "causal": flag(),
        "window": (draw(side), draw(side)) if windowed else (None, None),
        "positioned": positioned,
        "segmented": flag(),
        "counted": (flag(), flag()),
        "cap": draw(st.sampled_from([None, 2.0])),
        "sinks": flag(),
        "bias": draw(st.sampled_from(biases)) if form in PLAIN else None,
        "dense": form in PLAIN and flag(),
        "seed": draw(st.integers(0, 2**16)),
    }


def arrays_of(case):
    """Operands and mask arrays of a case, numpy."""
    random = np.random.default_rng(case["seed"])
    (t, s), (d, dv) = case["lengths"], case["dims"]
    normal = lambda *shape: random.normal(size=shape)
    operands = {
        "query": normal(BATCH, t, case["heads"], d),
        "key": normal(BATCH, s, case["kv_heads"], d),
        "value": normal(BATCH, s, case["kv_heads"], dv),
    }
    if case["bias"] is not None:
        full = (BATCH, case["heads"], t, s)
        operands["bias"] = normal(*(n if keep else 1 for n, keep in zip(full, case["bias"])))
    if case["sinks"]:
        operands["sinks"] = normal(case["heads"])
    ids = lambda n, high: random.integers(-1, high, (BATCH, n))
    return operands, {
        "positions": (ids(t, 9), ids(s, 9)) if case["positioned"] else None,
        "segments": (ids(t, 2), ids(s, 2)) if case["segmented"] else None,
        "counts": tuple(random.integers(0, n + 1, BATCH) if on else None for n, on in zip((t, s), case["counted"])),
        "dense": random.random((BATCH, 1, t, s)) < 0.7 if case["dense"] else None,
    }


def check(case):
    """Assert that an implementation agrees with the oracle on one case."""
    operands, parts = arrays_of(case)
    seen = visible(BATCH, case["lengths"], case["causal"], case["window"], *list(parts.values())[:3])[:, None]
    seen = seen if parts["dense"] is None else seen & parts["dense"]
    random = np.random.default_rng(case["seed"] + 1)
    out_weight = random.normal(size=(*operands["query"].shape[:3], case["dims"][1]))
    lse_weight = random.normal(size=operands["query"].shape[:3])

    def expected(operands):
        q, k, v = (operands[name] for name in ("query", "key", "value"))
        out, lse, _ = attend(q, k, v, operands.get("bias"), seen, operands.get("sinks"), cap=case["cap"])
        return out, lse

    def value(out, lse, xp):
        return (out * out_weight).sum() + (xp.where(xp.isfinite(lse), lse, 0.0) * lse_weight).sum()

    implementation, config = FORMS[case["form"]]
    pair = lambda x: None if x is None else (jnp.asarray(x[0], jnp.int32), jnp.asarray(x[1], jnp.int32))

    def ours(operands):
        out, lse = attention(
            **operands,
            mask=None if parts["dense"] is None else jnp.asarray(parts["dense"]),
            is_causal=case["causal"],
            local_window_size=case["window"],
            positions=pair(parts["positions"]),
            segment_ids=pair(parts["segments"]),
            query_seq_lengths=None if parts["counts"][0] is None else jnp.asarray(parts["counts"][0], jnp.int32),
            key_value_seq_lengths=None if parts["counts"][1] is None else jnp.asarray(parts["counts"][1], jnp.int32),
            logits_soft_cap=case["cap"],
            return_residual=True,
            implementation=implementation,
            config=config,
        )
        return value(out, lse, jnp), (out, lse)

    single = {name: jnp.asarray(x, jnp.float32) for name, x in operands.items()}
    (_, (out, lse)), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(single)
    true_out, true_lse = expected(operands)
    np.testing.assert_allclose(out, true_out, atol=OUTPUT_TOLERANCE)
    np.testing.assert_allclose(lse, true_lse, atol=OUTPUT_TOLERANCE)
    for name, gradient in grads.items():
        direction = random.normal(size=operands[name].shape)
        ahead, behind = (expected(operands | {name: operands[name] + e * direction}) for e in (STEP, -STEP))
        slope = (value(*ahead, np) - value(*behind, np)) / (2 * STEP)
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), slope, atol=GRADIENT_TOLERANCE, rtol=1e-4)


BUDGET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


@pytest.mark.parametrize("form", ["xla", "tiled"])
def test_grid(form):
    settings(max_examples=10, **BUDGET)(given(cases((form,)))(check))()


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [part if part < 4 else pytest.param(part, marks=pytest.mark.long) for part in range(10)]
)
def test_grid_of_500(part):
    seed(part)(settings(max_examples=50, **(BUDGET | {"derandomize": False}))(given(cases())(check)))()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_grid_of_the_tpu_kernel(part):
    """The same on the TPU kernel, simulated; it takes neither bias nor dense mask."""
    with (
        mock.patch.object(chips, "target", return_value=("tpu", "TPU v5 lite")),
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()),
    ):
        options = BUDGET | {"derandomize": False}
        seed(part)(settings(max_examples=20, **options)(given(cases(("tpu",)))(check)))()
