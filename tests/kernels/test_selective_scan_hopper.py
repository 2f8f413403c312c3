"""The Hopper kernels of the selective scan on a simulated GPU against the sequential form, with races detected.

The simulation runs copies, barriers and shared memory as the kernels ask for them; registers, layouts and the
hardware's own exponentials and quotients are not simulated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._compat import absent_gpu, simulated_gpu, simulates_gpu
from pallas_kernels.selective_scan import hopper_blocks, selective_scan
from tests.evidence import evidence
from tests.kernels.recurrence import IDS, with_gradients, worst
from tests.kernels.test_selective_scan import NAMES, arrays, run

simulated = pytest.mark.skipif(not simulates_gpu(), reason="jax older than 0.11 cannot simulate Mosaic GPU kernels")
SUMS = 1e-6
"""float32 sums over up to 42 tokens and 66 channels in another order, relative to the largest entry"""
ORACLE = "the sequential form and its jax.grad in float32"


def results(function, values):
    """Results and gradients as one list."""
    return jax.tree.leaves(with_gradients(function)(*values))


@simulated
@evidence("C09", oracle=ORACLE, code="pallas_kernels.selective_scan.hopper")
@pytest.mark.parametrize("case", ["all", "reverse"])
def test_everything_together(case, evidence):
    """Groups, skip, gate, bias, softplus, packing, NaN in absent tokens, an initial state, either direction of time.

    Two blocks of tokens, the second not full, each in two or four parts; two strips of channels, filled up from 33
    each; states, filled up from 12 or 20.
    """
    ids, state = (IDS, 12) if case == "all" else (IDS[:1], 20)
    values = [jnp.asarray(x, jnp.float32) for x in arrays(case, ids, width=66, groups=2, state=state)]
    expected = results(run("reference", case, ids), values)
    with simulated_gpu():
        got = results(run("hopper", case, ids), values)
    evidence.record(worst(got, expected), SUMS)
    named = dict(zip(NAMES, got[2:]))
    assert not any(np.asarray(named[name])[ids < 0].any() for name in ("x", "dt", "B", "C", "z"))


@simulated
@evidence("C09", oracle="law: parts with carried state, packing", code="pallas_kernels.selective_scan.hopper")
def test_parts_and_packing(evidence):
    """Two documents in one row, cut within the first: results and gradients of each document by itself.

    No skip, gate, bias, softplus nor initial state; a token is absent after each document, the second of which begins
    inside a block of the second part.
    """
    one = np.where(np.arange(14) < 13, 0, -1)
    row = np.concatenate([one, np.where(one < 0, -1, 1)])[None]
    values = [jnp.asarray(x, jnp.float32) for x in arrays("bare", np.stack([one, one]), width=2, groups=1, state=8)]

    def separate(*arrays):
        y, final = selective_scan(*arrays, segment_ids=np.stack([one, one]), implementation="reference")
        return y.reshape(1, 28, 2), final[1:]

    def together(*arrays):
        x, dt, B, C = (v.reshape(1, 28, *v.shape[2:]) for v in (*arrays[:2], *arrays[3:]))
        state, ys = None, []
        for part in (slice(9), slice(9, None)):
            cut = (x[:, part], dt[:, part], arrays[2], B[:, part], C[:, part])
            y, state = selective_scan(*cut, initial_state=state, segment_ids=row[:, part], implementation="hopper")
            ys.append(y)
        return jnp.concatenate(ys, axis=1), state

    expected = results(separate, values)
    with simulated_gpu():
        evidence.record(worst(results(together, values), expected), SUMS)


@simulated
@evidence("C09", oracle="float64 recurrence of the rounded inputs", code="pallas_kernels.selective_scan.hopper")
def test_bfloat16_is_as_good_as_the_chunked_form(evidence):
    """RMS errors of results and gradients at most 1.3 times those of XLA with the same inputs; float32 states."""
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays("all", IDS[1:], width=2, groups=1, state=8)]
    with jax.enable_x64(True):
        wanted = results(run("reference", "all", IDS[1:]), [np.asarray(x, np.float64) for x in rounded])
        exact = [np.asarray(x) for x in wanted]

    def wide(name):
        return lambda *arrays: [v.astype(jnp.float32) for v in run(name, "all", IDS[1:])(*arrays)]

    chunked = results(wide("xla"), rounded)
    with simulated_gpu():
        got = results(wide("hopper"), rounded)
    rms = lambda found, wanted: np.sqrt(np.mean((np.asarray(found, np.float64) - wanted) ** 2))
    for mine, its, wanted in zip(got, chunked, exact, strict=True):
        evidence.record(rms(mine, wanted), 1.3 * rms(its, wanted))


@evidence("C09", oracle="numpy.logaddexp in float64", code="pallas_kernels.selective_scan.hopper_blocks.softplus")
def test_softplus_is_exact_where_it_is_small(evidence):
    """Steps of 1e-3 are usual: log(1 + exp(v)) as written has a relative error of 6e-5 there.

    The argument of the exponential is rounded at up to 29, which is a relative 2^-20 of the result.
    """
    v = np.linspace(-20, 80, 100_001, dtype=np.float32)
    exact = v.astype(np.float64)
    value, slope = jax.jit(hopper_blocks.softplus)(v)
    evidence.record(np.abs(value / np.logaddexp(0, exact) - 1).max(), 2**-19)
    assert np.abs(slope * (1 + np.exp(-exact)) - 1).max() < 2**-19


def test_what_is_refused():
    """By name, with the reason; on a machine without the chip too."""
    x, A, B = jnp.ones((1, 4, 8)), -jnp.ones((8, 64)), jnp.ones((1, 4, 1, 64))
    with pytest.raises(NotImplementedError, match="does not run on cpu"):
        selective_scan(x, x, A, B, B, implementation="hopper")
    with absent_gpu(), pytest.raises(NotImplementedError, match="at most 32 numbers a channel, not 64"):
        selective_scan(x, x, A, B, B, implementation="hopper")
    with jax.enable_x64(True), absent_gpu(), pytest.raises(NotImplementedError, match="dt of float64"):
        selective_scan(x, np.ones(x.shape), A[:, :4], B[..., :4], B[..., :4], implementation="hopper")
