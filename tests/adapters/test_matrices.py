"""Methods that change matrices, one matrix at a time, against numpy's decompositions and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from llmjax.adapters import Adapted
from llmjax.adapters.adalora import AdaLoRA, penalty
from llmjax.adapters.boft import BOFT
from llmjax.adapters.dora import DoRA
from llmjax.adapters.dylora import DyLoRA
from llmjax.adapters.loha import LoHa
from llmjax.adapters.lokr import LoKr
from llmjax.adapters.lora import LoRA
from llmjax.adapters.oft import OFT
from llmjax.adapters.olora import OLoRA
from llmjax.adapters.pissa import PiSSA
from llmjax.adapters.vera import VeRA
from llmjax.config import ConfigError, validate
from llmjax.models.gpt2 import gpt2
from llmjax.nn.model import flat
from llmjax.nn.projections import Projection
from llmjax.quant.quantised import Quantised
from tests.adapters.cases import MODELS, TOKENS
from tests.evidence import evidence
from tests.models.golden import random_params

pytestmark = pytest.mark.adapters

P = Projection((12,), (2, 4), ("d_model", "heads", "head_dim"))
RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(size=(12, 2, 4)).astype(np.float32)


def drawn(adapter, kernel=KERNEL, std=0.3):
    """An adapter's parameters for one matrix, noise added to them."""
    boxes = adapter.start(jax.random.key(0), P, jnp.asarray(kernel))
    return {k: b.value + std * RANDOM.normal(size=b.value.shape).astype(np.float32) for k, b in boxes.items()}


def matrix(x):
    """Inputs by outputs, float64."""
    return np.asarray(x, np.float64).reshape(12, 8)


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(mine) - theirs).max() / np.abs(theirs).max())


@evidence(
    "G11", oracle="norms and directions by numpy; the gradient with the norm as a number", code="llmjax.adapters.dora"
)
def test_dora(evidence):
    """Columns are as long as m and point where W + s A B does; the norm has no gradient: 1e-5, float32 sums of 12."""
    adapter = DoRA(rank=3)
    params = drawn(adapter)
    changed = matrix(KERNEL) + adapter.scale * np.asarray(params["a"], np.float64) @ np.asarray(params["b"]).reshape(
        3, 8
    )
    norm, m = np.linalg.norm(changed, axis=0), np.asarray(params["magnitude"]).reshape(8)
    ours = adapter.weight(params, jnp.asarray(KERNEL), P, None)
    evidence.record(relative(np.linalg.norm(matrix(ours), axis=0), np.abs(m)), 1e-5)
    evidence.record(relative(matrix(ours), changed / norm * m), 1e-5)
    g = RANDOM.normal(size=(12, 8))
    loss = lambda params: jnp.sum(adapter.weight(params, jnp.asarray(KERNEL), P, None).reshape(12, 8) * g)
    found = jax.grad(loss)(params)
    evidence.record(relative(found["magnitude"].reshape(8), np.sum(g * changed / norm, axis=0)), 1e-5)
    low = adapter.scale * np.asarray(params["a"], np.float64).T @ (g * m / norm)
    evidence.record(relative(found["b"].reshape(3, 8), low), 1e-5)


@pytest.mark.parametrize("method", [PiSSA, OLoRA])
def test_what_moves_is_the_part_that_it_says(method):
    """s A B is the truncated SVD, or A B the first part of the QR decomposition, by numpy in float64: 1e-5."""
    adapter = method(rank=3, alpha=5.0)
    boxes = adapter.start(jax.random.key(0), P, jnp.asarray(KERNEL))
    ours = adapter.scale * np.asarray(boxes["a"].value, np.float64) @ np.asarray(boxes["b"].value).reshape(3, 8)
    u, s, v = np.linalg.svd(matrix(KERNEL), full_matrices=False)
    q, r = np.linalg.qr(matrix(KERNEL).T)
    theirs = {PiSSA: (u[:, :3] * s[:3]) @ v[:3], OLoRA: adapter.scale * (q[:, :3] @ r[:3]).T}[method]
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("method", [PiSSA, OLoRA])
def test_the_part_leaves_the_matrix(method):
    """The base's kernels become W - s A B, of the experts' too, and those that are no target stay."""
    model = Adapted(base=MODELS["mamba and experts"], adapters=(method(rank=1, targets="/(up|out)$"),))
    start = random_params(model.base)
    before, after = flat(start), flat(meta.unbox(jax.jit(model.completed)(start, jax.random.key(0))))
    for path in ("blocks/0/mixer/out", "blocks/0/mlp/experts/up"):
        a, b = (after[f"{path}/adapters/default/{leaf}"] for leaf in "ab")
        part = model.adapters[0].scale * jnp.einsum("...ir,...ro->...io", a, b)
        assert relative(after[f"{path}/kernel"] + part, before[f"{path}/kernel"]) < 1e-6
        assert relative(after[f"{path}/kernel"], before[f"{path}/kernel"]) > 1e-2
    assert np.array_equal(after["embed/embedding"], before["embed/embedding"])


def test_no_part_leaves_a_quantised_matrix():
    """One line that says what to do."""
    with pytest.raises(
        ConfigError, match="PiSSA moves a part of blocks/0/mixer/.*quantised.*full precision, or use LoRA"
    ):
        Adapted(base=Quantised(base=MODELS["attention"]), adapters=(PiSSA(rank=1),)).abstract()


@evidence("G22", oracle="jnp.kron of the factors, and numpy.linalg for the rank", code="llmjax.adapters.lokr")
@pytest.mark.parametrize("rank", [1, 4])
def test_lokr_is_a_kronecker_product(rank, evidence):
    """y = x W + (alpha / r) x (C kron D) without making it: 1e-5; its rank is the product of theirs."""
    adapter = LoKr(rank=rank, alpha=3.0)
    params = drawn(adapter)
    assert set(params) == ({"c", "d"} if rank == 4 else {"c", "a", "b"})
    own = {name: np.asarray(x, np.float64) for name, x in params.items()}
    d = own["d"] if rank == 4 else own["a"] @ own["b"]
    theirs = 3.0 / rank * np.kron(own["c"], d)
    x = RANDOM.normal(size=(5, 12)).astype(np.float32)
    y = adapter.output(FakeCall(lambda: 0.0, params), jnp.asarray(x), P)
    evidence.record(relative(y.reshape(5, 8), x @ theirs), 1e-5)
    evidence.record(relative(matrix(adapter.change(params, P, None)), theirs), 1e-5)
    assert np.linalg.matrix_rank(theirs) == np.linalg.matrix_rank(own["c"]) * np.linalg.matrix_rank(d)


@dataclasses.dataclass
class FakeCall:
    """What `output` reads of a call."""

    make: object
    params: dict
    shared: object = None


def test_loha_has_a_rank_that_lora_has_not():
    """The elementwise product of two matrices of rank 2 has rank 4 (Hyeon-Woo et al. 2021, proposition 2)."""
    adapter = LoHa(rank=2)
    change = matrix(adapter.change(drawn(adapter), P, None))
    values = np.linalg.svd(change, compute_uv=False)
    assert values[3] > 1e-3 * values[0] > 1e3 * values[4]


def test_oft_turns():
    """R is orthogonal with determinant 1, so that W'^T W' = W^T W: 1e-5. For small Q it is expm(2 Q) up to 2/3 Q^3."""
    adapter = OFT(block=4)
    for size in (1.0, 1e-2):
        params = {"skew": size * jnp.asarray(RANDOM.normal(size=(3, 6)), jnp.float32)}
        turn = np.asarray(adapter.turn(params), np.float64) + np.eye(4)
        assert np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(4)).max() < 1e-5
        assert np.allclose(np.linalg.det(turn), 1, atol=1e-5)
        ours, old = matrix(adapter.weight(params, jnp.asarray(KERNEL), P, None)), matrix(KERNEL)
        assert relative(ours.T @ ours, old.T @ old) < 1e-5
    upper = np.zeros((3, 4, 4))
    upper[:, *np.triu_indices(4, 1)] = params["skew"]
    q = upper - upper.transpose(0, 2, 1)
    turned = np.asarray(jax.scipy.linalg.expm(jnp.asarray(2 * q, jnp.float32)))
    cube = np.linalg.norm(q, ord=2, axis=(1, 2)).max() ** 3
    assert np.abs(turn - turned).max() < cube < 1e-4
    series = np.asarray(OFT(block=4, terms=5).turn(params))
    assert np.abs(series - (2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)).max() < 1e-6


def test_boft_turns():
    """R is orthogonal: 1e-6, float32 products of three turns. Each feature meets block 2^(factors - 1) others, itself
    counted; one factor is OFT of the same Q.
    """
    square, random = Projection((16,), (16,), ("d_model", "d_ff")), np.random.default_rng(0)
    skew = random.normal(size=(3, 4, 4, 4)).astype(np.float32)
    for factors in (1, 2, 3):
        params = {"skew": jnp.asarray(skew[:factors]), "scale": jnp.ones(16)}
        turn = np.asarray(BOFT(block=4, factors=factors).weight(params, jnp.eye(16), square, None), np.float64)
        assert np.abs(turn @ turn.T - np.eye(16)).max() < 1e-6
        met = np.kron(np.eye(16 // (4 * 2 ** (factors - 1))), np.ones((4 * 2 ** (factors - 1),) * 2))
        assert np.array_equal(turn != 0, met != 0)
    scale = jnp.asarray(random.normal(size=16), jnp.float32)
    ours = BOFT(block=4).weight({"skew": jnp.asarray(skew[:1]), "scale": scale}, jnp.eye(16), square, None)
    upper = ((skew[0] - skew[0].transpose(0, 2, 1)) / 2)[:, *np.triu_indices(4, 1)]
    assert relative(ours, OFT(block=4).weight({"skew": jnp.asarray(upper)}, jnp.eye(16), square, None) * scale) < 1e-6


def test_vera_trains_vectors_only():
    """rank + outputs numbers a projection: r 256 on the queries and values of GPT-2 124M, 12 x 2 x (768 + 256)."""
    model = Adapted(base=gpt2("124M"), adapters=(VeRA(targets="qv"),))
    leaves = flat(model.abstract())
    assert sum(x.size for path, x in leaves.items() if model.trains(path)) == 12 * 2 * (768 + 256)
    assert {path: x.shape for path, x in leaves.items() if path.startswith("adapters/")} == {
        "adapters/default/a": (768, 256),
        "adapters/default/b": (256, 768),
    }


@evidence(
    "G12",
    oracle="|W' - W| = s |v| of orthonormal P, Q (numpy qr); the penalty by numpy",
    code="llmjax.adapters.adalora",
)
def test_adalora_is_a_singular_value_decomposition(evidence):
    """With orthonormal factors the change is as long as its values, and its penalty is zero: 1e-5, float32."""
    adapter, random = AdaLoRA(rank=3), np.random.default_rng(1)
    p, q = np.linalg.qr(random.normal(size=(12, 3)))[0], np.linalg.qr(random.normal(size=(8, 3)))[0].T
    v = random.normal(size=3)
    params = {"a": jnp.asarray(p), "b": jnp.asarray(q.reshape(3, 2, 4)), "singular": jnp.asarray(v)}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    change = matrix(adapter.weight(params, jnp.zeros((12, 2, 4)), P, None))
    evidence.record(abs(np.linalg.norm(change) / (adapter.scale * np.linalg.norm(v)) - 1), 1e-5)
    evidence.record(float(penalty(params["a"], params["b"])), 1e-5)
    params = drawn(adapter)
    a, b = np.asarray(params["a"], np.float64), np.asarray(params["b"], np.float64).reshape(3, 8)
    wanted = np.sum((a.T @ a - np.eye(3)) ** 2) + np.sum((b @ b.T - np.eye(3)) ** 2)
    evidence.record(abs(float(penalty(params["a"], params["b"])) / wanted - 1), 1e-5)


@evidence("G12", oracle="the sum over layers and experts by numpy", code="llmjax.adapters.adalora")
def test_adalora_hands_out_its_penalty(evidence):
    """The loss beside the features is that of all matrices, of layers and experts, times its weight: 1e-5."""
    model = Adapted(base=MODELS["mamba and experts"], adapters=(AdaLoRA(rank=1, orthogonality=0.25),))
    params = random_params(model)
    module = model.build()
    collected = jax.jit(
        lambda params: module.apply({"params": params}, TOKENS, method="features", mutable=["losses"])[1]
    )(params)
    ours = sum(float(jnp.sum(x)) for path, x in flat(collected["losses"]).items() if path.endswith("_orthogonality"))
    wanted, leaves = 0.0, flat(params)
    for path, x in leaves.items():
        if path.endswith("/adapters/default/singular"):
            a, b = (np.asarray(leaves[path.replace("singular", leaf)], np.float64) for leaf in "ab")
            a, b = a.reshape(x.size, -1), b.reshape(x.size, -1)
            wanted += 0.25 * sum((np.sum(a**2, 1) - 1) ** 2 + (np.sum(b**2, 1) - 1) ** 2)
    evidence.record(abs(ours / wanted - 1), 1e-5)


@evidence("G33", oracle="LoRA of the first columns; uniform counts", code="llmjax.adapters.dylora")
def test_dylora(evidence):
    """All directions: LoRA. An active rank: LoRA of it, of the same scale. Training draws each rank from the least."""
    whole = DyLoRA(rank=4)
    params = drawn(whole)
    theirs = lambda n: LoRA(rank=n, alpha=4.0 * n).weight(
        {"a": params["a"][:, :n], "b": params["b"][:n]}, jnp.asarray(KERNEL), P, None
    )
    for n in (1, 2, 4):
        ours = dataclasses.replace(whole, active=n).weight(params, jnp.asarray(KERNEL), P, None)
        evidence.record(relative(ours, theirs(n)), 1e-6)
    model = Adapted(base=MODELS["attention"], adapters=(DyLoRA(rank=4, least=2, targets="blocks/0/mlp/down"),))
    full = random_params(model)
    sites = {"mutable": ["sites"]}
    out = lambda model, **named: model.build().apply({"params": full}, TOKENS, **sites, **named)[1]["sites"]["blocks"][
        "0"
    ]["mlp_out"][0]
    train = jax.jit(jax.vmap(lambda key: out(model, deterministic=False, rngs={"dropout": key})))
    found = np.asarray(train(jax.random.split(jax.random.key(0), 600)))
    each = [
        out(dataclasses.replace(model, adapters=(dataclasses.replace(model.adapters[0], active=n),))) for n in range(5)
    ]
    distances = np.stack([np.abs(found - np.asarray(y)).reshape(600, -1).max(1) for y in each])
    assert distances.min(0).max() < 1e-5
    counts = np.bincount(distances.argmin(0), minlength=5)
    # 600 draws of three: 200 +- 12 (one deviation).
    evidence.record(float(np.abs(counts - np.array([0, 0, 200, 200, 200])).max()), 60)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (OFT(block=3), "block=3.*does not divide the 8 inputs of"),
        (OFT(block=1), "block.*at least 2"),
        (BOFT(block=4, factors=2), "block=4.*, 8, does not divide the 12 inputs of"),
        (BOFT(block=3, factors=2), "block.*must be even"),
        (BOFT(factors=0), "factors.*at least 1"),
        (LoKr(factor=0), "factor.*at least 1, or -1"),
        (LoHa(rank=0), "rank.*at least 1"),
        (VeRA(rank=0), "rank.*at least 1"),
        (DyLoRA(rank=2, least=3), "least.*from 1 to the rank, 2"),
        (AdaLoRA(rank=2, orthogonality=-1.0), "orthogonality.*not be negative"),
        (DoRA(rank=9), "rank=9.*exceeds the 4 of"),
    ],
)
def test_what_does_not_fit_is_one_line(adapter, words):
    """Bad values name the field and what would be right."""
    with pytest.raises(ConfigError, match=words) as caught:
        validate(Adapted(base=MODELS["attention"], adapters=(adapter,)))
    assert "\n" not in str(caught.value)
