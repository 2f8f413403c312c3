"""Sums before a run: against worked numbers, brute force and the bytes of real arrays."""

import itertools
import math
import random

import numpy as np
import pytest

from llmjax.nn.decoder import Decoder
from llmjax.parallel.mesh import MeshConfig
from llmjax.plan import nbytes
from llmjax.plan.chips import CHIPS
from llmjax.plan.choice import cheapest, max_rows, pareto
from llmjax.plan.cost import cost
from llmjax.plan.decode_bound import decode_bound
from llmjax.plan.footprint import activations, adapters, distillation, full, lora, qlora, rlhf
from llmjax.plan.interval import checkpoint_every, lost
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.state import plan
from tests.evidence import evidence


@evidence("E56", oracle="every interval tried", code="llmjax.plan.interval")
def test_the_interval_loses_the_least(evidence):
    """The notes' example (k* = 63.2456, cost 126.49 at 63), and a hundred others."""
    assert checkpoint_every(1000, 4.0, 2.0) == 63
    assert lost(63, 1000, 4.0, 2.0) == pytest.approx(126.49, abs=0.005)
    draw = random.Random(0)
    for _ in range(100):
        steps, save, again, failures = (
            draw.randint(1, 3000),
            draw.uniform(0.1, 50),
            draw.uniform(0.1, 5),
            draw.randint(1, 9),
        )
        tried = min(lost(k, steps, save, again, failures) for k in range(1, steps + 1))
        mine = lost(checkpoint_every(steps, save, again, failures), steps, save, again, failures)
        evidence.record(mine / tried - 1, 1e-12)


@evidence("E76", oracle="Llama 3's published run: 16,000 GPUs, 54 days, 2.4 dollars an hour", code="llmjax.plan.cost")
def test_the_bill_of_llama_3(evidence):
    """49.77 million dollars and 3.79e25 FLOP; 1.3 million GPU hours of the 8B are 3.12 million dollars."""
    params, tokens = 405e9, 15.6e12
    rate = tokens / (54 * 24 * 3600)
    bill = cost(params, tokens, rate, 16_000, 2.4)
    evidence.record(abs(bill.price / 49.77e6 - 1), 1e-4)
    evidence.record(abs(bill.flops / 3.79e25 - 1), 1e-3)
    assert bill.days == pytest.approx(54)
    assert cost(8e9, 15e12, 15e12 / 1.3e6 / 3600 * 512, 512, 2.4).price == pytest.approx(3.12e6)


def state_bytes(model):
    """Parameters, gradients and Adam's state of a real plan."""
    abstract = plan(model, AdamW(), Train(), MeshConfig().build()).abstract
    return 2 * nbytes(abstract.params) + nbytes(abstract.opt_state)


@evidence("E77", oracle="bytes of the arrays of a real training state", code="llmjax.plan.footprint")
def test_bytes_of_training_are_those_of_the_arrays(evidence):
    """The optimizer's scalars are all that the formula leaves out."""
    model = Decoder(vocab=50257, d_model=256, layers=4)
    evidence.record(abs(full(model.num_params()) / state_bytes(model) - 1), 1e-6)


def test_published_footprints():
    """ZeRO: 16 bytes a parameter; QLoRA: 0.516 bytes a weight; Korthikanti: 5 a s / h of GPT-3 is 80, of MT-NLG 64."""
    assert [full(n) / 1e9 for n in (7e9, 13e9, 70e9)] == [112, 208, 1120]
    assert qlora(1e9, 0, 0) / 1e9 == pytest.approx(0.5159, abs=1e-4)
    assert lora(7e9, 0) / 1e9 == 14
    assert rlhf(7e9, 7e9, 7e9) == 2 * full(7e9) + 2 * lora(7e9, 0)
    for (heads, d_model), scores in {(96, 12288): 80, (128, 20480): 64}.items():
        whole, flash = (activations(2048, 1, d_model, heads, 1, keep) for keep in (True, False))
        assert (whole - flash) / (2048 * d_model) == pytest.approx(scores)
        assert flash / whole == pytest.approx(34 / (34 + scores))
    assert activations(512, 16, 768, 12, 12) / 1e9 == pytest.approx(5.59, abs=0.005)


def test_adapters_of_a_7b():
    """LLaMA-7B, rank 8: query and value alone 4,194,304 parameters, all linear layers 19,988,480."""
    layers = range(32)
    attention = {(i, name): (4096, 4096) for i in layers for name in "qkvo"}
    mlp = {
        (i, name): (4096, 11008) if name != "down" else (11008, 4096) for i in layers for name in ("gate", "up", "down")
    }
    pairs = {key: shape for key, shape in attention.items() if key[1] in "qv"}
    assert adapters(pairs, 8) == 4_194_304
    assert adapters(attention | mlp, 8) == 19_988_480


@evidence("E78", oracle="brute force; four published points", code="llmjax.plan.choice")
def test_choices_are_those_of_brute_force(evidence):
    """Retrieval methods by accuracy and latency: Self-RAG is beaten by RAPTOR, the others by nobody."""
    points = {"Naive": (72, -120), "HyDE": (81, -200), "Self-RAG": (88, -450), "RAPTOR": (92, -350)}
    assert pareto(points) == ["Naive", "HyDE", "RAPTOR"]
    draw = np.random.default_rng(0)
    for _ in range(20):
        cloud = {str(i): tuple(point) for i, point in enumerate(draw.integers(0, 6, (15, 3)).tolist())}
        front = pareto(cloud)
        for name, mine in cloud.items():
            better = [o for o in cloud.values() if o != mine and all(a >= b for a, b in zip(o, mine, strict=True))]
            assert (name in front) == (not better)
    for memory, fixed, row in itertools.product(range(12), range(14), range(1, 5)):
        most = max((n for n in range(13) if fixed + n * row <= memory), default=0)
        evidence.record(abs(max_rows(memory, fixed, row) - most), 0)
    assert max_rows(24e9, 16e9, 1e9) == 8


@evidence("E79", oracle="worked numbers: 38, 138 and 348 GB", code="llmjax.plan.footprint.distillation")
def test_bytes_of_distillation(evidence):
    for teacher, student, gigabytes in ((7e9, 1.5e9, 38), (13e9, 7e9, 138), (70e9, 13e9, 348)):
        evidence.record(abs(distillation(teacher, student) / 1e9 - gigabytes), 0)


@evidence("E80", oracle="hand numbers; enumeration", code="llmjax.plan.decode_bound")
def test_decoding_is_bound_by_bandwidth_and_then_by_arithmetic(evidence):
    """8.03e9 bfloat16 weights from 4.8 TB/s: 298.9 tokens a second at most, for one row without a past."""
    chip, params = CHIPS["h200"], 8.03e9
    one = decode_bound(chip, 2 * params, 0, 2 * params, 1)
    evidence.record(abs(one.tokens_per_second - 4.8e12 / 16.06e9), 1e-9)
    assert one.memory > one.compute
    # Weights are read once: at peak / bandwidth FLOPs a byte (206 rows here) arithmetic takes over.
    ridge = chip.flops / chip.hbm_bandwidth
    for rows in (math.floor(ridge), math.ceil(ridge)):
        bound = decode_bound(chip, 2 * params, 0, 2 * params, rows)
        assert (bound.compute > bound.memory) == (rows > ridge)
        assert bound.tokens_per_second <= chip.flops / (2 * params) * (1 + 1e-12)

    def bound(rows):
        return decode_bound(chip, 2 * params, 1e9, 2 * params, rows)

    def slow(rows):
        return max(bound(rows).compute, bound(rows).memory)

    # The most tokens a second of which each row still gets a hundred.
    best = cheapest(range(1, 500), lambda rows: -bound(rows).tokens_per_second, lambda rows: slow(rows) <= 0.01)
    assert slow(best) <= 0.01 < slow(best + 1)
