"""Training in a random subspace, and the search over variants of adapters with what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.adapters import Adapted
from llmjax.adapters.intrinsic import IntrinsicDimension, dense, fastfood, hadamard
from llmjax.adapters.lora import LoRA
from llmjax.adapters.search import best, frontier, storage, trainable, variants
from llmjax.config import ConfigError
from llmjax.models.gpt2 import gpt2
from llmjax.nn.model import flat
from tests.adapters.cases import MODELS
from tests.evidence import evidence

pytestmark = pytest.mark.adapters

FORMS = {"dense": dense, "fastfood": fastfood}


@evidence("G21", oracle="Sylvester's matrix by jnp.kron", code="llmjax.adapters.intrinsic")
def test_hadamard(evidence):
    """H x of eight entries, written out: sums of small integers, exact."""
    one = jnp.array([[1, 1], [1, -1]])
    x = jnp.arange(8.0) - 3
    evidence.record(float(jnp.abs(hadamard(x) - jnp.kron(jnp.kron(one, one), one) @ x).max()), 0)


@pytest.mark.parametrize("form", FORMS)
def test_projections_are_linear_and_keep_lengths(form):
    """P z is a fixed matrix times z, with entries of mean 0 and variance 1 / dimension (5 % at 2,000 x 40 entries)."""
    matrix = np.asarray(jax.jit(jax.vmap(lambda z: FORMS[form](jax.random.key(0), z, 2000)))(jnp.eye(40))).T
    assert matrix.shape == (2000, 40)
    assert abs(matrix.var() * 40 - 1) < 0.05
    assert abs(matrix.mean()) < 5 / np.sqrt(40 * matrix.size)
    z = jnp.sin(jnp.arange(40.0))
    np.testing.assert_allclose(FORMS[form](jax.random.key(0), z, 2000), matrix @ z, atol=1e-5)
    assert np.linalg.matrix_rank(matrix) == 40


@evidence("G21", oracle="Li et al. 2018, section 3: a task of ten constraints", code="llmjax.adapters.intrinsic")
@pytest.mark.parametrize("form", FORMS)
def test_a_task_of_known_dimension(form, evidence):
    """1,000 weights, tenths of which must sum to 1 ... 10: ten directions solve it by Gauss-Newton, nine do not."""
    wanted = jnp.arange(1.0, 11.0)
    sums = lambda z: FORMS[form](jax.random.key(1), z, 1000).reshape(10, 100).sum(-1)
    left = {}
    for dimension in (9, 10):
        start = jnp.zeros(dimension)
        jacobian = np.asarray(jax.jacobian(sums)(start), np.float64)
        z = np.linalg.lstsq(jacobian, np.asarray(wanted), rcond=None)[0]
        left[dimension] = float(jnp.abs(sums(jnp.asarray(z, jnp.float32)) - wanted).max())
    evidence.record(left[10], 1e-2)
    assert left[9] > 0.1


def test_only_the_small_vector_trains():
    """One vector for all matrices; keys of the projections stay."""
    model = Adapted(base=MODELS["attention"], adapters=(IntrinsicDimension(dimension=5),))
    assert trainable(model) == 5
    assert {path.split("/")[-1] for path in flat(model.abstract()) if "adapters/" in path} == {"z", "key"}


@evidence("G34", oracle="r (inputs + outputs) of each matrix, added up by hand", code="llmjax.adapters.search")
def test_variants_and_their_costs(evidence):
    """Every combination once, in order, with its trainable parameters; what does not fit is refused."""
    small, options = gpt2("124M"), {"targets": ("q", "qv", "attention"), "rank": (4, 8), "alpha": (8.0, 16.0)}
    found = list(variants(small, LoRA(), options))
    fields = [(m.adapters[0].targets, m.adapters[0].rank, m.adapters[0].alpha) for m in found]
    assert fields == [(t, r, a) for t in options["targets"] for r in (4, 8) for a in (8.0, 16.0)]
    for model, (targets, rank, _) in zip(found, fields, strict=True):
        matrices = {"q": 1, "qv": 2, "attention": 4}[targets]
        evidence.record(abs(trainable(model) - 12 * matrices * rank * 2 * 768), 0)
    with pytest.raises(ConfigError, match="exceeds the 4 of"):
        list(variants(MODELS["attention"], LoRA(), {"rank": (2, 9)}))


@evidence("G34", oracle="a table whose best rows are known", code="llmjax.adapters.search")
def test_best_of_a_known_table(evidence):
    """By score alone, by score less price, and what nothing beats at its cost."""
    scores, costs = [85.0, 92.0, 97.0, 98.0, 97.0], [1.0, 2.0, 4.0, 8.0, 5.0]
    found = [best(scores, costs), best(scores, costs, 0.5), best(scores, costs, 4.0), best([1.0, 1.0], [2.0, 1.0])]
    wanted = [3, 2, 1, 1]
    evidence.record(sum(a != b for a, b in zip(found, wanted, strict=True)), 0)
    assert frontier(scores, costs) == [0, 1, 2, 3]


@evidence("G41", oracle="T |W| and |W| + T |D|; 5 GB against 0.5 GB of the notes", code="llmjax.adapters.search")
def test_storage_of_many_tasks(evidence):
    """Ten tasks of GPT-2 124M in float32: ten copies, and one with ten adapters of rank 16."""
    small = gpt2("124M")
    full, shared = storage(Adapted(base=small, adapters=(LoRA(rank=16, targets="qv"),)), tasks=10)
    evidence.record(abs(full - 10 * 124_439_808 * 4), 0)
    evidence.record(abs(shared - (124_439_808 + 10 * 589_824) * 4), 0)
    assert round(full / 1e9) == 5
    assert 9 < full / shared < 10
    biases = storage(Adapted(base=small, trained="bias$"), tasks=10)[1]
    evidence.record(abs(biases - (124_439_808 + 10 * 102_144) * 4), 0)
