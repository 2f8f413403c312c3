"""Merging, arithmetic of changes, extraction and the measures of them, against numpy and the laws that they have."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.adapters import Adapted, LoRA
from llmjax.adapters.arithmetic import applied, concatenated, dare, dropped, task_vector, ties, trimmed, weighted_sum
from llmjax.adapters.dora import DoRA
from llmjax.adapters.extraction import extracted
from llmjax.adapters.interference import against_chance, cosine, overlap
from llmjax.adapters.merge import merge, unmerge
from llmjax.adapters.oft import OFT
from llmjax.adapters.prompt import PromptTuning
from llmjax.adapters.spectra import energy, entropy_rank, matrices, numerical_rank, singular_values, stable_rank
from llmjax.config import ConfigError
from llmjax.nn.model import flat, unflat
from llmjax.quant.quantised import Quantised
from tests.adapters.cases import MODELS, logits_of
from tests.evidence import evidence
from tests.models.golden import random_params

RANDOM = np.random.default_rng(0)
BASE = MODELS["attention"]


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(mine) - np.asarray(theirs)).max() / np.abs(theirs).max())


STACKS = {
    "attention": (DoRA(rank=2, targets="mlp"), LoRA(name="two", rank=3), OFT(name="three", block=4, targets="qv")),
    "mamba and experts": (LoRA(rank=1), DoRA(name="two", rank=2, targets="head"), LoRA(name="three", targets="embed")),
}


@evidence("G05", oracle="the model with its adapters on", code="llmjax.adapters.merge")
@pytest.mark.parametrize("kind", STACKS)
def test_merged_equals_dynamic_and_unmerges(kind, evidence):
    """Several methods on layers, experts, embedding and head: logits 1e-5, other sums; the base comes back to 1e-6."""
    model = Adapted(base=MODELS[kind], adapters=STACKS[kind])
    params = random_params(model)
    merged, changes = merge(model, params)
    assert flat(merged).keys() == flat(model.base.abstract()).keys()
    evidence.record(relative(logits_of(model.base)(merged), logits_of(model)(params)), 1e-5)
    again = flat(unmerge(merged, changes))
    for path, x in flat(params).items():
        if path in again:
            evidence.record(float(np.abs(again[path] - x).max() / max(1, np.abs(x).max())), 1e-6)


@pytest.mark.adapters
def test_a_quantised_base_is_asked_for_first():
    """Merging into a quantised matrix is refused in one line; dequantised, it is the model with its adapters."""
    base = Quantised(base=MODELS["attention"])
    model = Adapted(base=base, adapters=(LoRA(rank=2, targets="qv"),))
    params = random_params(Adapted(base=base.base, adapters=model.adapters))
    plain = unflat({path: x for path, x in flat(params).items() if "adapters/" not in path})
    kernels = flat(jax.jit(base.init)(jax.random.key(0), plain))
    params = unflat({path: kernels.get(path, x) for path, x in flat(params).items()})
    with pytest.raises(ConfigError, match="blocks/0/mixer/query/kernel is quantised.*dequantise=True"):
        merge(model, params)
    merged, changes = merge(model, params, dequantise=True)
    assert set(changes) == {f"blocks/0/mixer/{name}/kernel" for name in ("query", "value")}
    assert relative(logits_of(base)(merged), logits_of(model)(params)) < 1e-5


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ((LoRA(name="one", rank=1), DoRA(rank=1)), "DoRA 'default' rescales.*put it first"),
        ((PromptTuning(),), "PromptTuning 'default' changes activations.*merge the others"),
    ],
)
def test_what_does_not_fold_is_one_line(adapters, words):
    """Methods without a matrix, and an order that would compute something else."""
    with pytest.raises(ConfigError, match=words):
        merge(Adapted(base=BASE, adapters=adapters), {})


@evidence("G39", oracle="sums of numpy; logits of the separate adapters", code="llmjax.adapters.arithmetic")
def test_task_arithmetic(evidence):
    """Adding then subtracting is the base; the ends of an interpolation are the tuned ones: one rounding, 1e-6."""
    base, one, two = (random_params(BASE, seed) for seed in range(3))
    first, second = task_vector(one, base), task_vector(two, base)
    there = applied(base, weighted_sum((first, second), (1.0, 1.0)))
    back = applied(applied(there, first, -1.0), second, -1.0)
    ends = [applied(base, weighted_sum((first, second), (w, 1 - w))) for w in (1.0, 0.0)]
    for mine, theirs in ((back, base), (ends[0], one), (ends[1], two)):
        evidence.record(max(map(relative, jax.tree.leaves(mine), jax.tree.leaves(theirs))), 1e-6)
    path = "blocks/0/mlp/down/kernel"
    wanted = flat(base)[path] + (flat(one)[path] - flat(base)[path]) + (flat(two)[path] - flat(base)[path])
    evidence.record(relative(flat(there)[path], wanted), 1e-6)


@evidence("G39", oracle="numpy sums of the products", code="llmjax.adapters.arithmetic")
def test_ranks_side_by_side_are_the_sum(evidence):
    """w1 s1 A1 B1 + w2 s2 A2 B2 exactly (1e-5, other sums); the sum of the factors is something else."""
    adapters = (LoRA(name="one", rank=2), LoRA(name="two", rank=3, alpha=5.0, stabilised=True))
    model = Adapted(base=BASE, adapters=adapters)
    params = random_params(model)
    together, joined = concatenated(model, params, (0.75, -0.5))
    assert (together.adapters[0].rank, together.adapters[0].scale) == (5, 1.0)
    new, old = flat(joined), flat(params)
    for place in ("blocks/0/mixer/query", "blocks/0/mixer/out", "blocks/0/mlp/up"):
        product = lambda leaves, name, place=place: np.einsum(
            "lir,lro->lio",
            np.asarray(leaves[f"{place}/adapters/{name}/a"], np.float64).reshape(2, -1, RANKS[name]),
            np.asarray(leaves[f"{place}/adapters/{name}/b"], np.float64).reshape(2, RANKS[name], -1),
        )
        wanted = 0.75 * adapters[0].scale * product(old, "one") - 0.5 * adapters[1].scale * product(old, "two")
        evidence.record(relative(product(new, "default"), wanted), 1e-5)
    with pytest.raises(ConfigError, match="LoRAs of the same targets"):
        concatenated(model, params, (1.0,))


RANKS = {"one": 2, "two": 3, "default": 5}


def test_ties_by_hand():
    """Two vectors of four entries: half is trimmed, signs elected, and those that agree averaged."""
    one, two = jnp.array([3.0, -1.0, 0.5, 2.0]), jnp.array([-1.0, -4.0, 0.1, 5.0])
    assert trimmed(one, 0.5).tolist() == [3, 0, 0, 2]
    # After trimming: (3, 0, 0, 2) and (0, -4, 0, 5). Signs: +, -, +, +. Means of those that agree: 3, -4, none, 3.5.
    assert ties((one, two), (1.0, 1.0), 0.5).tolist() == [3, -4, 0, 3.5]


def test_dare_keeps_the_mean():
    """A tenth of the entries is left, ten times as large: mean and count within five deviations of the binomial."""
    vector = {"a": jnp.ones((300, 300)), "b": 2 * jnp.ones(1000)}
    thin = dropped(vector, 0.1, jax.random.key(0))
    assert set(np.unique(thin["a"])) == {0.0, 10.0}
    assert abs(float(jnp.mean(thin["a"])) - 1) < 5 * 3 / 300
    assert abs(float(jnp.mean(thin["b"])) - 2) < 5 * 2 * 3 / math.sqrt(1000)
    assert not np.array_equal(thin["a"].reshape(-1)[:1000] > 0, thin["b"] > 0)
    # A sum of two, each thinned by a draw of its own, so that some places keep one alone.
    both = dare((vector["a"], vector["a"]), (1.0, 2.0), 0.1, jax.random.key(0))
    assert set(np.unique(both)) == {0.0, 10.0, 20.0, 30.0}
    assert abs(float(jnp.mean(both)) - 3) < 5 * math.sqrt(5) * 3 / 300


@evidence("G40", oracle="closed forms: the same, disjoint and random changes", code="llmjax.adapters.interference")
def test_interference(evidence):
    """The same: cosine 1, overlap of singular values; disjoint: 0; random: 1/sqrt(outputs) whatever the rank.

    The squares of 400 pairs of rank 2 deviate by 0.7 each: their mean by 0.035, of which four are allowed.
    """
    one = jnp.asarray(RANDOM.normal(size=(6, 9)), jnp.float32)
    s = np.linalg.svd(one, compute_uv=False)
    evidence.record(abs(float(cosine(one, one)) - 1), 1e-5)
    evidence.record(abs(float(overlap(one, one)) - np.linalg.norm(s**2) / np.sum(s**2)), 1e-5)
    left, right = one.at[:, 4:].set(0), one.at[:, :4].set(0)
    evidence.record(float(overlap(left, right)) + abs(float(cosine(left, right))), 1e-5)
    for rank in (2, 32):
        pair = [RANDOM.normal(size=(400, 32, rank)) @ RANDOM.normal(size=(400, rank, 128)) for _ in range(2)]
        squares = jnp.square(against_chance(*(jnp.asarray(x, jnp.float32) for x in pair)))
        evidence.record(abs(float(jnp.mean(squares)) - 1), 0.15)


@evidence("G19", oracle="identity n, rank one 1, and by hand", code="llmjax.adapters.spectra")
def test_ranks_of_known_matrices(evidence):
    """Of an identity all ranks are n, of rank one 1, of zeros 0; the entropy of (1/2, 1/4, 1/4) is 1.5 bits: 1e-5."""
    ones, eye = jnp.outer(jnp.arange(1.0, 5), jnp.arange(2.0, 8)), jnp.eye(4)
    for rank in (numerical_rank, entropy_rank, stable_rank):
        evidence.record(abs(float(rank(singular_values(eye))) - 4), 1e-5)
        evidence.record(abs(float(rank(singular_values(ones))) - 1), 1e-3 if rank is entropy_rank else 1e-5)
        evidence.record(float(rank(jnp.zeros(3))), 1e-5)
    values = jnp.array([2.0, 1.0, 1.0])
    evidence.record(abs(float(entropy_rank(values)) - 2**1.5), 1e-5)
    evidence.record(abs(float(stable_rank(values)) - 1.5), 1e-5)
    evidence.record(float(jnp.abs(energy(values) - jnp.array([4, 5, 6]) / 6).max()), 1e-5)


@evidence(
    "G20", oracle="the error formula of Eckart, Young and Mirsky; random competitors", code="llmjax.adapters.extraction"
)
def test_extraction(evidence):
    """The error is the tail of the singular values in both norms, and no random factors of the rank come nearer."""
    model = Adapted(base=BASE, adapters=(LoRA(rank=2, alpha=3.0),))
    base, tuned = random_params(BASE), random_params(BASE, seed=1)
    params, captured = extracted(model, base, tuned)
    changes = merge(model, params)[1]
    wanted = matrices(BASE, {path: flat(tuned)[path] - flat(base)[path] for path in captured})
    for path, ours in matrices(BASE, changes).items():
        rest = np.asarray(wanted[path] - ours, np.float64)
        tail = np.linalg.svd(np.asarray(wanted[path], np.float64), compute_uv=False)[:, 2:]
        evidence.record(relative(np.linalg.norm(rest, axis=(1, 2)), np.linalg.norm(tail, axis=1)), 1e-5)
        evidence.record(relative(np.linalg.norm(rest, ord=2, axis=(1, 2)), tail[:, 0]), 1e-5)
        whole = np.linalg.norm(wanted[path], axis=(1, 2)) ** 2
        evidence.record(relative(captured[path], 1 - np.sum(tail**2, axis=1) / whole), 1e-5)
    change = np.asarray(wanted["blocks/0/mlp/up/kernel"][0], np.float64)
    best = np.linalg.norm(change - np.asarray(matrices(BASE, changes)["blocks/0/mlp/up/kernel"][0]), ord=2)
    for _ in range(100):
        a = RANDOM.normal(size=(change.shape[0], 2))
        competitor = change - a @ np.linalg.lstsq(a, change)[0]
        assert np.linalg.norm(competitor) >= np.linalg.norm(np.linalg.svd(change)[1][2:]) - 1e-9
        assert np.linalg.norm(competitor, ord=2) >= best - 1e-5


def test_extraction_of_a_low_rank_change_is_exact():
    """A tuned base that is a merged LoRA comes back whole: energy 1 and the same matrices, 1e-5."""
    model = Adapted(base=BASE, adapters=(LoRA(rank=2, targets="qv"),))
    params = random_params(model)
    tuned, changes = merge(model, params)
    base = unflat({path: x for path, x in flat(params).items() if "adapters/" not in path})
    again, captured = extracted(dataclasses.replace(model, adapters=model.adapters), base, tuned)
    for path, x in merge(model, again)[1].items():
        if path in captured:
            assert relative(x, changes[path]) < 1e-5
            assert np.abs(captured[path] - 1).max() < 1e-5
